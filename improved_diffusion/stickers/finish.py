"""From a cut-out to a sticker's file that Telegram takes: one side exactly 512 pixels, PNG or WebP, under 512 KB."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt

from improved_diffusion.errors import UserError
from improved_diffusion.settings import require
from improved_diffusion.stickers.photos import Outcome, Photo, make_each

SIDE = 512  # pixels of the longer side
MOST_BYTES = 512_000  # core.telegram.org/stickers says 512 KB: less than either kilobyte
FORMATS = ("webp", "png")
WIDEST = 64  # of an outline, in pixels
VISIBLE = 13  # of 255: an alpha that counts as content
FEWER_BITS = (7, 6, 5)  # of a PNG's colours
FINER = 2  # times the resolution at which an outline's edge is found


def finish(cut: Image.Image, outline: int = 0) -> Image.Image:
    """Crop a cut-out to its content, give it an outline, and scale it.

    Args:
        cut: RGBA.
        outline: width of a white outline in pixels of the sticker.

    Returns:
        RGBA, its longer side, the outline included, exactly SIDE pixels.

    Raises:
        UserError: no content, or a width that an outline cannot have.
    """
    require_outline(outline)
    content = crop_to_content(cut)
    scale = (SIDE - 2 * outline) / max(content.size)
    width, height = (max(1, round(side * scale)) for side in content.size)
    sticker = Image.new("RGBA", (width + 2 * outline, height + 2 * outline))
    sticker.paste(content.resize((width, height), Image.Resampling.LANCZOS), (outline, outline))
    return add_outline(sticker, outline) if outline else sticker


def require_outline(width: int) -> None:
    """Raise UserError where an outline cannot be so wide."""
    require(0 <= width <= WIDEST, f"an outline is 0 to {WIDEST} pixels wide, not {width}")


def crop_to_content(cut: Image.Image) -> Image.Image:
    """Without the margins in which nothing can be seen. Raises UserError where that is all."""
    if cut.mode != "RGBA" or cut.getchannel("A").getextrema()[0] == 255:
        raise UserError("the picture has no transparency: cut it out first (stickers.py cut)")
    alpha = np.asarray(cut.getchannel("A"))
    if alpha.max() < 128:
        raise UserError("nothing can be seen of the picture: it is transparent")
    rows, columns = (np.flatnonzero((alpha >= VISIBLE).any(axis=axis)) for axis in (1, 0))
    return cut.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))


def add_outline(picture: Image.Image, width: int) -> Image.Image:
    """White behind a picture and up to `width` pixels around it, its edge antialiased.

    Args:
        picture: RGBA, with room for the outline.
    """
    alpha = picture.getchannel("A")
    fine = np.asarray(alpha.resize([FINER * side for side in alpha.size], Image.Resampling.BICUBIC))
    # From a pixel's centre to the edge, which lies half a pixel before the centre of the first one inside.
    distance = distance_transform_edt(fine < 128) - 0.5
    coverage = np.rint(255 * np.clip(FINER * width - distance + 0.5, 0, 1)).astype(np.uint8)
    behind = Image.new("RGBA", picture.size, "white")
    behind.putalpha(Image.fromarray(coverage).reduce(FINER))
    return Image.alpha_composite(behind, picture)


def encode(sticker: Image.Image, kind: str) -> bytes:
    """The content of a sticker's file, without loss where that fits into MOST_BYTES, else with the least that does.

    Args:
        sticker: RGBA, of at most SIDE pixels a side.
        kind: one of FORMATS.
    """
    return next(data for data in _encodings(sticker, kind) if len(data) < MOST_BYTES)


def _encodings(sticker: Image.Image, kind: str) -> Iterator[bytes]:
    """Ever smaller ones; the last is small enough whatever is shown."""
    if kind == "webp":
        yield _saved(sticker, "webp", lossless=True, quality=50)
        yield _best_webp(sticker)
        yield _saved(sticker, "webp", quality=1, alpha_quality=50)
    else:
        yield _saved(sticker, "png", optimize=True)
        for bits in FEWER_BITS:
            levels = 2**bits - 1
            fewer = sticker.point(
                [round(round(value / 255 * levels) * 255 / levels) for value in range(256)] * 3 + list(range(256))
            )
            yield _saved(fewer, "png", optimize=True)
        # A byte for each pixel at most, as many as half of MOST_BYTES.
        yield _saved(sticker.quantize(256, Image.Quantize.FASTOCTREE), "png", optimize=True)


def _best_webp(sticker: Image.Image) -> bytes:
    """Of the highest quality that fits; of the lowest, where none does."""
    best, low, high = _saved(sticker, "webp", quality=1), 2, 95
    while low <= high:
        quality = (low + high) // 2
        data = _saved(sticker, "webp", quality=quality)
        if len(data) < MOST_BYTES:
            best, low = data, quality + 1
        else:
            high = quality - 1
    return best


def _saved(sticker: Image.Image, kind: str, **settings: object) -> bytes:
    file = io.BytesIO()
    sticker.save(file, kind, **settings)
    return file.getvalue()


def require_sticker(file: Path) -> None:
    """See that a file is what Telegram takes as a static sticker.

    Raises:
        UserError: it is not, and why.
    """
    size = file.stat().st_size
    require(size < MOST_BYTES, f"{file} has {size:,} bytes, and a sticker less than {MOST_BYTES:,}")
    try:
        with Image.open(file, formats=[kind.upper() for kind in FORMATS]) as image:
            image.load()
    except Exception as error:  # Pillow raises almost anything
        raise UserError(f"{file} is no sticker ({error}): remove it, and it is made again") from error
    require(max(image.size) == SIDE, f"{file} is {image.width} x {image.height}, and one side of a sticker {SIDE}")


def finish_photos(photos: Sequence[Photo], out: Path, outline: int, kind: str) -> Outcome:
    """Write a sticker, out/NAME.webp or .png, of each cut-out; see `make_each`. All are read again at the end.

    Raises:
        UserError: as `make_each` does, or a file is no sticker.
    """

    def make(photo: Photo) -> bytes:
        return encode(finish(photo.load_transparent(), outline), kind)

    outcome = make_each(photos, out, f".{kind}", {"outline": outline, "format": kind}, make, "finishing")
    for file in outcome.made.values():
        require_sticker(file)
    return outcome
