"""Say what photographs show, by BLIP.

python stickers.py caption photos/*.jpg --out captions
"""

from __future__ import annotations

from improved_diffusion.errors import ArgumentParser
from improved_diffusion.stickers.commands.options import DEVICE, add_caption_options, add_files, report


def run(arguments: list[str]) -> None:
    parser = ArgumentParser(prog="stickers.py caption", description=__doc__.splitlines()[0])
    add_files(parser, "PHOTO", "photographs; the caption of NAME.jpg is written to DIR/NAME.txt")
    add_caption_options(parser)
    parser.add_argument("--device", help=DEVICE)
    options = parser.parse_args(arguments)

    # Imported only now: torch takes seconds, and typos are answered at once.
    from improved_diffusion.stickers.photos import find_photos

    photos = find_photos(options.photos)
    from improved_diffusion.runtime.devices import usable_device
    from improved_diffusion.stickers.caption import caption_photos

    outcome = caption_photos(photos, options.out, options.blip, options.prefix, usable_device(options.device))
    for name, file in outcome.made.items():
        print(f"{name}: {file.read_text().strip()}")
    report(outcome, options.out)
