"""Write a trained cut-out to one small .safetensors file, read it back, and compare.

python stickers.py segment export runs/cutout --out cutout.safetensors
"""

from __future__ import annotations

from pathlib import Path

from improved_diffusion.errors import ArgumentParser, UserError

TOLERANCE = 0.02  # by how much half precision may move an alpha
COMPARED = 8  # pictures


def run(arguments: list[str]) -> None:
    parser = ArgumentParser(prog="stickers.py segment export", description=__doc__.splitlines()[0])
    parser.add_argument("cutout", metavar="RUN", help="a run, or one of its checkpoints")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors file")
    options = parser.parse_args(arguments)

    # Imported only now: torch takes seconds, and typos are answered at once.
    import numpy as np

    from improved_diffusion.stickers.segment.cutout import export, load_cutout
    from improved_diffusion.stickers.segment.drawing import HELD_OUT, seeded
    from improved_diffusion.stickers.segment.pictures import Photographs
    from improved_diffusion.stickers.segment.scenery import background

    cutout = load_cutout(options.cutout, "cpu")
    export(cutout, options.out)
    written = load_cutout(options.out, "cpu")
    scenes = [
        background(cutout.config.image_size, Photographs(()), seeded(0, HELD_OUT, number)) for number in range(COMPARED)
    ]
    difference = max(float(np.abs(cutout(scene) - written(scene)).max()) for scene in scenes)
    if difference > TOLERANCE:
        options.out.unlink()
        raise UserError(
            f"in half precision alpha moves by {difference:.3f}, more than {TOLERANCE}: nothing was written"
        )
    size = options.out.stat().st_size / 1e6
    print(f"written: {options.out}, {size:.1f} MB; read back, its alpha differs by at most {difference:.4f}")
