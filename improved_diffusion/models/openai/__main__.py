"""A run directory of a published checkpoint, to sample from and to measure:

python -m improved_diffusion.models.openai imagenet64_uncond_100M_1500K.pt --out runs/imagenet64
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit


def main(arguments: list[str]) -> int:
    parser = ArgumentParser(
        prog="python -m improved_diffusion.models.openai",
        description="Make a run directory, for sample.py and fid.py, of a checkpoint of openai/improved-diffusion.",
    )
    parser.add_argument("checkpoint", help="their .pt file")
    parser.add_argument("--out", required=True, help="run directory to make")
    parser.add_argument("--schedule", choices=("cosine", "linear"), default="cosine", help="default: cosine")
    parser.add_argument("--timesteps", type=int, default=4000, help="T in training (default: 4000, as published)")
    parser.add_argument(
        "--timestep-range",
        type=float,
        default=1000,
        help="default: 1000; the number of timesteps for one trained with --rescale_timesteps False (imagenet64_cond)",
    )
    parser.add_argument("--image-size", type=int, help="pixels; default: what the channel multipliers imply")
    parser.add_argument("--num-heads", type=int, default=4, help="attention heads (default: 4, as published)")
    options = parser.parse_args(arguments)

    # Only now, for torch takes seconds to import: --help and typos are answered at once.
    from improved_diffusion.config import Config, DiffusionConfig, UNetConfig
    from improved_diffusion.models.openai.conversion import read_network
    from improved_diffusion.run_directory import RunDirectory

    run = RunDirectory(Path(options.out))
    if run.config_file.exists():
        raise UserError(f"{run.path} already holds a run: choose another --out")
    network, settings = read_network(options.checkpoint, options.image_size, options.num_heads)
    num_classes, out_channels = settings.pop("num_classes"), settings.pop("out_channels")
    config = Config(
        loss="hybrid" if out_channels == 6 else "mse",
        model=UNetConfig(**settings, class_conditional=num_classes is not None),
        diffusion=DiffusionConfig(
            timesteps=options.timesteps, schedule=options.schedule, timestep_range=options.timestep_range
        ),
    )
    state = {
        "step": 0,
        "model": network.state_dict(),
        "ema": {},  # the published weights are averages already
        "class_names": [f"class_{index:04d}" for index in range(num_classes or 0)],
    }
    run.save_checkpoint(state, keep=1)
    run.write_config(config, [{"command_line": shlex.join(sys.argv), "imported_from": str(options.checkpoint)}])
    parameters = sum(p.numel() for p in network.parameters())
    print(f"wrote {run.path}: {parameters / 1e6:.2f} M parameters; sample with python sample.py --run {run.path}")
    return 0


if __name__ == "__main__":
    with user_errors_exit():
        sys.exit(main(sys.argv[1:]))
