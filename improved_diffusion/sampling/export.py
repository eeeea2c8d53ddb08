"""A run's model in one file, for others or for later:

    python -m improved_diffusion.sampling.export runs/hybrid --out hybrid.safetensors

It holds the weights that sample.py would draw from, the settings, the class names, and where it comes from. sample.py,
fid.py and `improved_diffusion.load` take it where they take a run, and draw the same pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit
from improved_diffusion.sampling.flags import EMA_LENGTH_HELP

if TYPE_CHECKING:
    from improved_diffusion.sampling.model import Model


def export(model: Model, path: Path, *, half: bool = False) -> None:
    """Write `model` to a .safetensors file.

    Args:
        model: from `load`.
        path: of the file, which must not be there yet.
        half: weights in float16, in half the space: pictures are then not those of the model to the bit.

    Raises:
        UserError: there is a file already, another ending, or a disk that cannot be written.
    """
    from improved_diffusion.provenance import project_version
    from improved_diffusion.sampling.model_file import SUFFIX, ModelFile

    if path.suffix != SUFFIX:
        raise UserError(f"{path}: the name must end in {SUFFIX}")
    if path.exists():
        raise UserError(f"{path} exists already: choose another name")
    weights = model.network.state_dict()
    origin = {"checkpoint_sha256": model.checkpoint_sha256, "exported_by": project_version()}
    ModelFile(
        weights={name: (tensor.half() if half else tensor).cpu() for name, tensor in weights.items()},
        config=model.config,
        class_names=model.class_names,
        step=model.step,
        ema_rate=model.ema_rate,
        ema_length=model.ema_length,
        selected_on=model.selected_on,
        provenance={**model.provenance, **origin},
    ).write(path)


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
    options = parser.parse_args(arguments)

    # Only now, for torch takes seconds to import: --help and typos are answered at once.
    from improved_diffusion.sampling.loading import load

    model = load(options.run, options.checkpoint, options.ema, "cpu", ema_length=options.ema_length)
    export(model, options.out, half=options.half)
    print(f"wrote {options.out}: {model.checkpoint} (step {model.step:,}), {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    with user_errors_exit():
        main(sys.argv[1:])
