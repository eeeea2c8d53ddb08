"""The full variational bound of a model on an image set, in bits/dim, and its terms by timestep.

python scripts/bound.py runs/hybrid data/food101-64/test [--n 100] [--steps 250] [--json FILE]

L_vlb, xstart_mse and mse are those of improved DDPM (arXiv:2102.09672, figure 2). Lower is better.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit
from improved_diffusion.files import write_text


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run directory")
    parser.add_argument("data", help="packed image set")
    parser.add_argument("--n", type=int, default=100, help="images, spread evenly over the set (default: 100)")
    parser.add_argument("--steps", type=int, help="timesteps of the bound (default: all of the model's)")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the terms of each timestep there")
    options = parser.parse_args(arguments)

    import numpy as np

    from improved_diffusion.data import open_image_set
    from improved_diffusion.sampling.bound import bound_on_images, bound_rows
    from improved_diffusion.sampling.loading import load

    if options.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {options.batch_size}")
    image_set = open_image_set(options.data)
    rows = bound_rows(image_set, options.n)
    model = load(options.run)
    bound = bound_on_images(model, image_set, rows, options.steps, options.batch_size)
    vlb, xstart_mse, mse, total, prior = bound.vlb, bound.xstart_mse, bound.mse, bound.total, bound.prior
    error = float(total.std()) / len(total) ** 0.5 if len(total) > 1 else float("nan")
    print(f"{model.checkpoint}, {options.n} images of {options.data}, {vlb.shape[1]} timesteps")
    print(f"bound {float(total.mean()):.4f} ± {error:.4f} bits/dim (prior {float(prior.mean()):.2e})")
    print(f"{'t':>12} {'L_vlb':>10} {'xstart_mse':>12} {'mse':>10}   (sums, means, means)")
    for quarter in np.array_split(np.arange(vlb.shape[1]), min(4, vlb.shape[1])):
        terms = f"{float(vlb[:, quarter].sum(1).mean()):10.4f} {float(xstart_mse[:, quarter].mean()):12.5f}"
        print(f"{quarter[0]:>5}..{quarter[-1]:>5} {terms} {float(mse[:, quarter].mean()):10.5f}")
    if options.json:
        columns = {"vlb": vlb, "xstart_mse": xstart_mse, "mse": mse}
        record = {name: column.mean(0).tolist() for name, column in columns.items()}
        write_text(options.json, json.dumps({"total": float(total.mean()), "prior": float(prior.mean()), **record}))


if __name__ == "__main__":
    with user_errors_exit():
        main(sys.argv[1:])
