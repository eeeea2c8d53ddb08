"""Make stickers of photographs: caption, draw anew, cut out, finish; and a sheet of all stages.

python stickers.py make photos/cat.jpg --run runs/stickers --out cat
"""

from __future__ import annotations

from improved_diffusion.errors import ArgumentParser
from improved_diffusion.stickers.commands.options import (
    add_caption_options,
    add_cut_options,
    add_files,
    add_finish_options,
    add_restyle_options,
    open_style,
    require_all,
)


def run(arguments: list[str]) -> None:
    parser = ArgumentParser(prog="stickers.py make", description=__doc__.splitlines()[0])
    add_files(parser, "PHOTO", "photographs; the sticker of NAME.jpg is DIR/stickers/NAME.webp")
    add_caption_options(parser)
    add_restyle_options(parser)
    add_cut_options(parser)
    add_finish_options(parser)
    options = parser.parse_args(arguments)

    # Imported only now: torch takes seconds, and typos are answered at once.
    from improved_diffusion.stickers.photos import find_photos

    photos = find_photos(options.photos)
    from PIL import Image

    from improved_diffusion.runtime.devices import usable_device
    from improved_diffusion.sampling.grids import save_png
    from improved_diffusion.stickers.caption import caption_photos
    from improved_diffusion.stickers.cut import cut_photos
    from improved_diffusion.stickers.finish import finish_photos, require_outline
    from improved_diffusion.stickers.matte import identity, load_matter
    from improved_diffusion.stickers.prompt import CAPTION, read_captions
    from improved_diffusion.stickers.restyle import restyle_photos
    from improved_diffusion.stickers.sheet import Stages, stages_sheet

    require_outline(options.outline)  # before minutes are spent
    device = usable_device(options.device)
    matter = load_matter(options.matting, device)
    out = options.out
    usable, captions, refused = photos, {}, []
    if options.prompt is None or CAPTION in options.prompt:
        captioned = caption_photos(photos, out / "captions", options.blip, options.prefix, device)
        usable = [photo for photo in photos if photo.name in captioned.made]
        captions, refused = read_captions(usable, out / "captions"), captioned.refused
    style, model = open_style(parser, options)
    restyled = restyle_photos(usable, out / "restyled", style, captions, model)
    cut = cut_photos(restyled.photos(), out / "cut", matter, identity(options.matting))
    finished = finish_photos(cut.photos(), out / "stickers", options.outline, options.format)
    if finished.made:
        stages = (
            Stages(
                photo.name,
                captions.get(photo.name, options.prompt),
                photo.load(),
                *(Image.open(stage.made[photo.name]) for stage in (restyled, cut, finished)),
            )
            for photo in usable
            if photo.name in finished.made
        )
        save_png(stages_sheet(stages), out / "sheet.png")
        print(f"{len(finished.made)} stickers in {out / 'stickers'}, all stages on {out / 'sheet.png'}")
    require_all([*refused, *restyled.refused, *cut.refused, *finished.refused])
