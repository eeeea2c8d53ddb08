"""Write a cut-out to one small .safetensors file, as a finished run does by itself, read it back, and compare.

python stickers.py segment export runs/cutout/checkpoints/step_0005000.pt --out cutout.safetensors
"""

from __future__ import annotations

from pathlib import Path

from improved_diffusion.errors import ArgumentParser


def run(arguments: list[str]) -> None:
    parser = ArgumentParser(prog="stickers.py segment export", description=__doc__.splitlines()[0])
    parser.add_argument("cutout", metavar="RUN", help="a run, or one of its checkpoints")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors file")
    options = parser.parse_args(arguments)

    # Imported only now: torch takes seconds, and typos are answered at once.
    from improved_diffusion.stickers.segment.cutout import export, load_cutout

    difference = export(load_cutout(options.cutout, "cpu"), options.out)
    size = options.out.stat().st_size / 1e6
    print(f"written: {options.out}, {size:.1f} MB; read back, its alpha differs by {difference:.4f} in the mean")
