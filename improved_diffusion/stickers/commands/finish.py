"""Make stickers of cut-outs: cropped, outlined, one side 512 pixels, under 512 KB.

python stickers.py finish cut/*.png --outline 8 --out stickers
"""

from __future__ import annotations

from improved_diffusion.errors import ArgumentParser
from improved_diffusion.stickers.commands.options import add_files, add_finish_options, report


def run(arguments: list[str]) -> None:
    parser = ArgumentParser(prog="stickers.py finish", description=__doc__.splitlines()[0])
    add_files(parser, "IMAGE", "transparent pictures; the sticker of NAME.png is written to DIR/NAME.webp")
    add_finish_options(parser)
    options = parser.parse_args(arguments)

    from improved_diffusion.stickers.finish import finish_photos
    from improved_diffusion.stickers.photos import find_photos

    photos = find_photos(options.photos)
    report(finish_photos(photos, options.out, options.outline, options.format), options.out)
