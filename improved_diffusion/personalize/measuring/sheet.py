"""Contact sheets: pictures in rows and columns, with what made them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 192  # pixels of the longer side of a picture on a sheet
MARGIN = 6
FONT = 13
LETTERS = 30  # of a line of a row's title


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | Path | None]], titles: Sequence[str], columns: Sequence[str] = ()
) -> np.ndarray:
    """Pictures side by side, scaled alike.

    Args:
        rows: of equal lengths, pictures or their files; None leaves a place free.
        titles: one for each row, at its left.
        columns: one for each column, above it; none by default.

    Returns:
        uint8 (height, width, 3).
    """
    largest = max(max(_size(picture)) for row in rows for picture in row if picture is not None)
    scale = SIDE / largest
    font = ImageFont.load_default(FONT)
    titles = [textwrap.fill(title, LETTERS, break_on_hyphens=False) for title in titles]
    columns = [textwrap.fill(title, int(SIDE / FONT * 2)) for title in columns]
    left = 2 * MARGIN + max(round(font.getlength(line)) for title in titles for line in title.split("\n"))
    top = MARGIN + max((title.count("\n") + 1) * (FONT + 5) for title in columns) if columns else 0
    page = Image.new("RGB", (left + len(rows[0]) * SIDE, top + len(rows) * SIDE), "white")
    pen = ImageDraw.Draw(page)
    for number, title in enumerate(columns):
        pen.multiline_text(
            (left + (number + 0.5) * SIDE, top / 2), title, fill="black", font=font, anchor="mm", align="center"
        )
    for y, (row, title) in enumerate(zip(rows, titles, strict=True)):
        middle = (left - MARGIN, top + (y + 0.5) * SIDE)
        pen.multiline_text(middle, title, fill="black", font=font, anchor="rm", align="right")
        for x, picture in enumerate(row):
            if picture is not None:
                picture = _in_colour(picture)
                size = [max(1, round(side * scale)) for side in picture.size]
                offset = [(SIDE - side) // 2 for side in size]
                place = (left + x * SIDE + offset[0], top + y * SIDE + offset[1])
                page.paste(picture.resize(size, Image.Resampling.LANCZOS), place)
    return np.asarray(page)


# A file is open only while it is read: a sheet may show more pictures than the system lets be open at once.


def _size(picture: Image.Image | Path) -> tuple[int, int]:
    if isinstance(picture, Image.Image):
        return picture.size
    with Image.open(picture) as opened:
        return opened.size


def _in_colour(picture: Image.Image | Path) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    with Image.open(picture) as opened:
        return opened.convert("RGB")
