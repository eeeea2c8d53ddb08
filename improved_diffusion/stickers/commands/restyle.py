"""Draw photographs anew in a learned style.

python stickers.py restyle photos/*.jpg --captions captions --run runs/stickers --out restyled
"""

from __future__ import annotations

from pathlib import Path

from improved_diffusion.errors import ArgumentParser
from improved_diffusion.stickers.commands.options import add_files, add_restyle_options, open_style, report


def run(arguments: list[str]) -> None:
    parser = ArgumentParser(prog="stickers.py restyle", description=__doc__.splitlines()[0])
    add_files(parser, "PHOTO", "photographs; that of NAME.jpg is written to DIR/NAME.png")
    parser.add_argument("--captions", type=Path, help="folder of NAME.txt (default: beside the photographs)")
    add_restyle_options(parser)
    options = parser.parse_args(arguments)

    # Imported only now: torch takes seconds, and typos are answered at once.
    from improved_diffusion.stickers.photos import find_photos

    photos = find_photos(options.photos)
    from improved_diffusion.stickers.prompt import read_captions
    from improved_diffusion.stickers.restyle import restyle_photos

    style, model = open_style(parser, options)
    captions = read_captions(photos, options.captions)
    report(restyle_photos(photos, options.out, style, captions, model), options.out)
