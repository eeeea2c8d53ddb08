"""A run's model in one file, for others or for later:

    python -m improved_diffusion.sampling.export runs/hybrid --out hybrid.safetensors

It holds the weights that sample.py would draw from, the settings, the class names, and where it comes from. sample.py,
fid.py and `improved_diffusion.load` take it where they take a run, and draw the same pictures; with
`--guidance-scale 2`, those that sample.py would draw with that flag.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from improved_diffusion.errors import ArgumentParser, user_errors_exit
from improved_diffusion.sampling.flags import EMA_LENGTH_HELP, add_sampling_flags, flag_changes


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(
        prog="python -m improved_diffusion.sampling.export", description="Write a run's model to one .safetensors file."
    )
    parser.add_argument("run", metavar="RUN", help="run directory, checkpoint, or pretrained")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a name that ends in .safetensors")
    parser.add_argument("--checkpoint", help="best, latest or step_0015000.pt (default: best, or else latest)")
    parser.add_argument("--ema", type=float, metavar="RATE", help="moving average of the weights (default: the first)")
    parser.add_argument("--ema-length", type=float, metavar="SIGMA_REL", help=EMA_LENGTH_HELP)
    parser.add_argument("--half", action="store_true", help="weights in float16: half the size, other last digits")
    add_sampling_flags(parser, with_guide=False)
    options = parser.parse_args(arguments)

    # Only now, for torch takes seconds to import.
    from improved_diffusion import load
    from improved_diffusion.sampling.model import change_sampling
    from improved_diffusion.sampling.model_file import export

    model = load(options.run, options.checkpoint, options.ema, "cpu", ema_length=options.ema_length)
    sampling = change_sampling(model.config.sampling, **flag_changes(options))
    model.denoiser(sampling)  # refuses what this model cannot do
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, sampling=sampling))
    export(model, options.out, half=options.half)
    print(f"wrote {options.out}: {model.checkpoint} (step {model.step:,}), {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    with user_errors_exit():
        main(sys.argv[1:])
