"""Cutting the foreground out of a picture: soft alpha, and edges without the colour of what was behind them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from improved_diffusion.data.decode import to_rgb
from improved_diffusion.errors import UserError
from improved_diffusion.stickers.matte import Matter, own_alpha
from improved_diffusion.stickers.photos import Outcome, Photo, make_each, png

LEAST = 0.02  # of alpha, that is taken for none; a sigmoid is never quite 0 or 1
SMALLEST = 0.002  # of a picture's pixels, that are something
SLOW_SECONDS = 3


def cut_out(picture: Image.Image, matter: Matter) -> Image.Image:
    """The foreground of a picture.

    Args:
        picture: RGB or RGBA.
        matter: what tells it from the background.

    Returns:
        RGBA of the same size, black where nothing is left. Its colours are those of the foreground alone; of a picture
        that is cut along its own transparency they are the file's.

    Raises:
        UserError: there is no foreground.
    """
    alpha = matter(picture)
    alpha = np.where(alpha < LEAST, 0, np.where(alpha > 1 - LEAST, 1, alpha)).astype(np.float32)
    if (alpha >= 0.5).mean() < SMALLEST:
        raise UserError("nothing stands out from the background, so there is nothing to cut out")
    if matter is own_alpha:
        colours = np.asarray(picture.convert("RGB"))
    else:
        colours = foreground(np.asarray(to_rgb(picture)), alpha)
    pixels = np.dstack([colours, np.rint(255 * alpha).astype(np.uint8)])
    pixels[pixels[..., 3] == 0] = 0
    return Image.fromarray(pixels)


def foreground(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The colours of the foreground: what a pixel at its edge was before the background was mixed in.

    Germer et al. 2020, "Fast Multi-Level Foreground Estimation", arXiv:2006.14970, by pymatting.

    Args:
        colours: uint8 (H, W, 3).
        alpha: float32 (H, W) in [0, 1].

    Returns:
        uint8 (H, W, 3).
    """
    # Compiled at its first use in an installation, for a minute; later it is there in a second.
    notice = threading.Timer(
        SLOW_SECONDS, print, ("compiling pymatting, once, for about a minute",), {"file": sys.stderr}
    )
    notice.start()
    try:
        from pymatting import estimate_foreground_ml
    finally:
        notice.cancel()
    return np.rint(255 * estimate_foreground_ml(colours / 255, alpha.astype(np.float64))).astype(np.uint8)


def cut_photos(photos: Sequence[Photo], out: Path, matter: Matter, name: str) -> Outcome:
    """Write out/NAME.png, the foreground of each picture; see `make_each`.

    Args:
        matter: what tells it from the background.
        name: what tells the matter from others; see `identity`.

    Raises:
        UserError: as `make_each` does.
    """

    def make(photo: Photo) -> bytes:
        return png(cut_out(photo.load_transparent(), matter))

    return make_each(photos, out, ".png", {"matting": name}, make, "cutting out")
