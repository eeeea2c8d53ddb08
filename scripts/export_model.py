"""A run's model alone, small enough to share: python scripts/export_model.py runs/hybrid --out pretrained/hybrid

The weights are those that sample.py would use, in float16; what only training needs is left behind.
"""

from __future__ import annotations

import sys
from pathlib import Path

from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--out", type=Path, required=True, help="run directory to make")
    parser.add_argument("--checkpoint", help="best, latest or step_0015000.pt (default: best, or else latest)")
    options = parser.parse_args(arguments)

    import torch

    from improved_diffusion.run_directory import RunDirectory
    from improved_diffusion.sampling.generate import load_model

    if options.out.exists():
        raise UserError(f"{options.out} exists already: choose another --out")
    model = load_model(options.run, torch.device("cpu"), options.checkpoint)
    weights = {name: tensor.half().contiguous() for name, tensor in model.network.state_dict().items()}
    out = RunDirectory(options.out)
    file = out.save_checkpoint(
        {"step": model.step, "model": weights, "ema": {}, "class_names": list(model.class_names)}, keep=1
    )
    out.write_config(model.config, [{"exported_from": f"{options.run.name}/{model.checkpoint.name}"}])
    print(f"wrote {file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    with user_errors_exit():
        main(sys.argv[1:])
