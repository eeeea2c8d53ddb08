"""Sample grids: one row per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from improved_diffusion.data.compositing import on_white
from improved_diffusion.files import atomic_write


def make_grid(
    rows: np.ndarray,
    titles: tuple[str, ...] | None = None,
    column_titles: tuple[str, ...] = (),
    corner: str = "",
) -> np.ndarray:
    """Put images side by side.

    Args:
        rows: uint8 (R, C, H, W, channels): grey, RGB, or RGBA, which is shown on white.
        titles: R names, written to the left of their rows; none by default.
        column_titles: C names, written above their columns; none by default.
        corner: what the column titles are, written to the left of them.

    Returns:
        uint8 (height, width, 3).
    """
    rgb = on_white(torch.from_numpy(rows)).numpy()
    grid = rearrange(rgb, "r c h w rgb -> (r h) (c w) rgb")
    if titles is None:
        return grid
    font = ImageFont.load_default(12)
    margin = 8 + max(round(font.getlength(title)) for title in (*titles, corner))
    head = 18 if column_titles else 0
    height, width = rows.shape[2:4]
    page = Image.new("RGB", (margin + grid.shape[1], head + grid.shape[0]), "white")
    page.paste(Image.fromarray(grid), (margin, head))
    draw = ImageDraw.Draw(page)
    for row, title in enumerate(titles):
        draw.text((margin - 4, head + (row + 0.5) * height), title, fill="black", font=font, anchor="rm")
    draw.text((margin - 4, head / 2), corner, fill="black", font=font, anchor="rm")
    for column, title in enumerate(column_titles):
        draw.text((margin + (column + 0.5) * width, head / 2), title, fill="black", font=font, anchor="mm")
    return np.asarray(page)


def save_png(image: np.ndarray, path: Path, *, durable: bool = True) -> None:
    """Write uint8 (H, W, C), C 1 (grey), 3 (RGB) or 4 (RGBA), whole or not at all; see `atomic_write`."""
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    with atomic_write(path, durable=durable) as temporary:
        Image.fromarray(pixels).save(temporary, format="png")
