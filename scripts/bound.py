"""The full variational bound of a model on an image set, in bits/dim, and its terms by timestep.

python scripts/bound.py runs/hybrid data/food101-64/test [--n 100] [--steps 250] [--json FILE]

L_vlb, xstart_mse and mse are those of improved DDPM (arXiv:2102.09672, figure 2). Lower is better.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit
from improved_diffusion.files import atomic_write


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
    import torch

    from improved_diffusion.config import SamplingConfig
    from improved_diffusion.data import open_image_set
    from improved_diffusion.diffusion.bound import variational_bound
    from improved_diffusion.diffusion.noise import PerSampleNoise
    from improved_diffusion.models.build import build_schedule
    from improved_diffusion.progress import progress
    from improved_diffusion.sampling.loading import load

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {options.batch_size}")
    image_set = open_image_set(options.data)
    model = load(options.run, device=device)
    if not 1 <= options.n <= len(image_set.images):
        raise UserError(f"--n must be between 1 and the {len(image_set.images)} images of {options.data}")
    if model.config.model.class_conditional and image_set.class_names != model.class_names:
        raise UserError(f"the classes of {options.data} are not those of the run {options.run}")
    sampling = SamplingConfig(steps=options.steps)
    denoiser = model.denoiser(sampling)
    schedule = build_schedule(model.config.diffusion, sampling)
    rows = np.linspace(0, len(image_set.images) - 1, options.n).round().astype(int)
    bounds = []
    with torch.inference_mode():
        for part in progress(iterable=np.array_split(rows, -(-len(rows) // options.batch_size)), desc="batches"):
            x = torch.from_numpy(image_set.images[part]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
            y = torch.from_numpy(image_set.labels[part]).to(device) if model.config.model.class_conditional else None
            noise = PerSampleNoise([(0, 0, int(row)) for row in part], tuple(x.shape[1:]), device)
            bounds.append(variational_bound(denoiser, schedule, x, y, noise))
    vlb, xstart_mse, mse = (torch.cat([getattr(b, name) for b in bounds]) for name in ("vlb", "xstart_mse", "mse"))
    total, prior = (torch.cat([getattr(b, name) for b in bounds]) for name in ("total", "prior"))
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
        with atomic_write(options.json) as temporary:
            temporary.write_text(json.dumps({"total": float(total.mean()), "prior": float(prior.mean()), **record}))


if __name__ == "__main__":
    with user_errors_exit():
        main(sys.argv[1:])
