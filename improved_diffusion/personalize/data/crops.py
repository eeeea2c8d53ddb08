"""From images of any size to the sizes that a network is trained at: aspect-ratio buckets, crops and flips.

SDXL is told how each image was treated (Podell et al. 2023, arXiv:2307.01952, section 2.2): its size before the resize,
where in the resized image the crop begins, and the size of the crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

STEP = 64  # pixels; sides of buckets are multiples of it, as the networks halve latents three times
MOST_ELONGATED = 2.0  # longer side over shorter, of a bucket


@dataclass(frozen=True)
class Crop:
    """An image cut to a size, and how it was."""

    pixels: Tensor  # float32 (3, H, W) on [-1, 1]
    original_size: tuple[int, int]  # (height, width) of the image as it came
    top_left: tuple[int, int]  # (y, x) of the crop in the resized image, mirrored with it

    @property
    def size_ids(self) -> Tensor:
        """float32 (6,): SDXL's conditions: original size, top left, size of the crop; each height or y first."""
        return torch.tensor([*self.original_size, *self.top_left, *self.pixels.shape[1:]], dtype=torch.float32)


def buckets(resolution: int, elongated: bool) -> list[tuple[int, int]]:
    """(height, width) of the sizes to train at: the square, and if `elongated` others of at most its area."""
    if not elongated:
        return [(resolution, resolution)]
    sides = range(STEP, int(resolution * math.sqrt(MOST_ELONGATED)) + STEP, STEP)
    sizes = {(resolution, resolution)}
    for short in sides:
        long = resolution**2 // short // STEP * STEP
        if short <= long <= MOST_ELONGATED * short:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def choose_bucket(width: int, height: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) whose shape is nearest to an image's; among equals the largest."""
    return min(sizes, key=lambda size: (abs(math.log((size[1] / size[0]) / (width / height))), -size[0] * size[1]))


def fit(
    image: Image.Image, size: tuple[int, int], position: float = 0.5, flip: bool = False
) -> tuple[Image.Image, tuple[int, int]]:
    """Resize `image` so that it just covers `size`, (height, width), and cut that out of it.

    Args:
        position: from 0 to 1, where along the side that is too long the crop lies: 0.5 is the centre.
        flip: mirror it left to right.

    Returns:
        The crop, and its (top, left) in the resized image.
    """
    height, width = size
    scale = max(width / image.width, height / image.height)
    resized = image.resize(
        (max(width, round(image.width * scale)), max(height, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    if flip:
        resized = ImageOps.mirror(resized)
    left, top = round((resized.width - width) * position), round((resized.height - height) * position)
    return resized.crop((left, top, left + width, top + height)), (top, left)


def cut(image: Image.Image, size: tuple[int, int], position: float = 0.5, flip: bool = False) -> Crop:
    """See `fit`."""
    fitted, top_left = fit(image, size, position, flip)
    pixels = torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 127.5 - 1)
    return Crop(pixels.permute(2, 0, 1), (image.height, image.width), top_left)


def variants(crops: int, flip: bool) -> list[tuple[float, bool]]:
    """(position, mirrored) for `cut`: `crops` positions, evenly from end to end (one: the centre), mirrored too if
    `flip`."""
    positions = np.linspace(0, 1, crops).tolist() if crops > 1 else [0.5]
    return [(position, mirrored) for position in positions for mirrored in (False, True)[: 1 + flip]]
