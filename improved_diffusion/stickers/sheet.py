"""All stages of stickers on one sheet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from improved_diffusion.personalize.measuring.sheet import SIDE, contact_sheet

COLUMNS = ("photograph", "drawn anew", "alpha", "cut out", "sticker", "on white", "on dark")
SQUARE = 8  # pixels of the checkerboard that stands for transparency
CHECKERS, DARK = (255, 204), (24, 26, 30)
INSET = 4  # pixels between a picture and the next


@dataclass(frozen=True)
class Stages:
    """What became of one photograph."""

    name: str
    caption: str
    photo: Image.Image
    restyled: Image.Image
    cut: Image.Image  # RGBA
    sticker: Image.Image  # RGBA


def stages_sheet(photos: Iterable[Stages]) -> np.ndarray:
    """A row for each photograph, none of which is kept at its own size. Returns uint8 (height, width, 3)."""
    rows, titles = zip(*((_row(photo), f"{photo.name}: {photo.caption}") for photo in photos), strict=True)
    return contact_sheet(rows, titles, COLUMNS)


def _row(photo: Stages) -> list[Image.Image]:
    """As many squares as there are COLUMNS."""
    alpha = photo.cut.getchannel("A")
    opaque = [_square(picture, _plain("white")) for picture in (photo.photo, photo.restyled, alpha)]
    backgrounds = (checkerboard(), _plain("white"), _plain(DARK))
    return [*opaque, _square(photo.cut, checkerboard()), *(_square(photo.sticker, behind) for behind in backgrounds)]


def _square(picture: Image.Image, behind: Image.Image) -> Image.Image:
    """A picture in the middle of `behind`, which is RGBA."""
    fitted = ImageOps.contain(picture.convert("RGBA"), (SIDE - 2 * INSET, SIDE - 2 * INSET), Image.Resampling.LANCZOS)
    placed = Image.new("RGBA", behind.size)
    placed.paste(fitted, tuple((SIDE - side) // 2 for side in fitted.size))
    return Image.alpha_composite(behind, placed)


def checkerboard() -> Image.Image:
    """What stands for transparency: RGBA."""
    y, x = np.indices((SIDE, SIDE)) // SQUARE
    return Image.fromarray(np.where((x + y) % 2, *CHECKERS).astype(np.uint8)).convert("RGBA")


def _plain(colour: str | tuple[int, int, int]) -> Image.Image:
    return Image.new("RGBA", (SIDE, SIDE), colour)
