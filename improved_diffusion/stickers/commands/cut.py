"""Cut the foreground out of pictures: transparent PNG, its edges without the colour of the background.

python stickers.py cut photos/*.jpg --out cut
"""

from __future__ import annotations

from improved_diffusion.errors import ArgumentParser
from improved_diffusion.stickers.commands.options import DEVICE, add_cut_options, add_files, report


def run(arguments: list[str]) -> None:
    parser = ArgumentParser(prog="stickers.py cut", description=__doc__.splitlines()[0])
    add_files(parser, "IMAGE", "pictures; the foreground of NAME.jpg is written to DIR/NAME.png")
    add_cut_options(parser)
    parser.add_argument("--device", help=DEVICE)
    options = parser.parse_args(arguments)

    # Imported only now: torch takes seconds, and typos are answered at once.
    from improved_diffusion.stickers.cut import cut_photos
    from improved_diffusion.stickers.matte import identity, load_matter
    from improved_diffusion.stickers.photos import find_photos

    photos = find_photos(options.photos)
    matter = load_matter(options.matting, options.device)
    report(cut_photos(photos, options.out, matter, identity(options.matting)), options.out)
