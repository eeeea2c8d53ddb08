"""What lies behind a sticker: colours, gradients, shapes, textures and photographs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from improved_diffusion.stickers.segment.pictures import Photographs

PHOTOGRAPH_SHARE = 0.5  # of the backgrounds, where there are photographs


def background(size: int, photographs: Photographs, rng: np.random.Generator) -> Image.Image:
    """RGB of `size` pixels a side: a part of a photograph, sharp or out of focus, or one of DRAWN."""
    if len(photographs) and rng.random() < PHOTOGRAPH_SHARE:
        return _photograph(size, photographs, rng)
    return DRAWN[rng.integers(len(DRAWN))](size, rng)


def colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """Any; one in three is white, black or grey, as many backgrounds are."""
    if rng.random() < 1 / 3:
        return (int(rng.choice([0, 255, rng.integers(256)])),) * 3
    red, green, blue = (int(value) for value in rng.integers(256, size=3))
    return red, green, blue


def _photograph(size: int, photographs: Photographs, rng: np.random.Generator) -> Image.Image:
    picture = photographs.load(int(rng.integers(len(photographs))))
    side = min(picture.size) * rng.uniform(0.4, 1.0)
    left, top = (rng.uniform(0, max(0.0, length - side)) for length in picture.size)
    part = picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if rng.random() < 0.4:
        part = part.filter(ImageFilter.GaussianBlur(rng.uniform(0.01, 0.08) * size))
    return part


def _plain(size: int, rng: np.random.Generator) -> Image.Image:
    return Image.new("RGB", (size, size), colour(rng))


def _gradient(size: int, rng: np.random.Generator) -> Image.Image:
    """Between two colours, along a line or about a point."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    if rng.random() < 0.5:
        angle = rng.uniform(0, 2 * np.pi)
        position = x * np.cos(angle) + y * np.sin(angle)
    else:
        centre = rng.uniform(-0.5, 0.5, 2)
        position = np.hypot(x - centre[0], y - centre[1])
    return _between(position, rng)


def _noise(size: int, rng: np.random.Generator) -> Image.Image:
    """Octaves of smooth noise, in two colours or, channel by channel, in many."""
    if rng.random() < 0.5:
        return _between(_octaves(size, rng), rng)
    channels = np.stack([_octaves(size, rng) for _ in range(3)], axis=-1)
    return _to_image(255 * (channels - channels.min()) / max(np.ptp(channels), 1e-6))


def _pattern(size: int, rng: np.random.Generator) -> Image.Image:
    """Stripes, squares or dots in two colours."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.04, 0.4)
    y, x = np.mgrid[:size, :size] / size
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    waves = np.sin(2 * np.pi * along / period), np.sin(2 * np.pi * across / period)
    position = (waves[0], waves[0] * waves[1], waves[0] + waves[1])[rng.integers(3)]
    return _between(np.clip(position * rng.uniform(1, 10) + rng.uniform(-1, 1), -1, 1), rng)


def _shapes(size: int, rng: np.random.Generator) -> Image.Image:
    """Flat ellipses, boxes and triangles, cut by the frame more often than not: rooms, hills, other drawings."""
    image = DRAWN[rng.integers(3)](size, rng)  # any but a pattern and this
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(2, 10)):
        corners = rng.uniform(-0.4, 1.4, (3, 2)) * size
        (left, top), (right, bottom) = np.sort(corners[:2], axis=0).tolist()
        kind = rng.integers(3)
        if kind == 0:
            draw.ellipse((left, top, right, bottom), fill=colour(rng))
        elif kind == 1:
            draw.rectangle((left, top, right, bottom), fill=colour(rng))
        else:
            draw.polygon([tuple(corner) for corner in corners.tolist()], fill=colour(rng))
    return image if rng.random() < 0.7 else image.filter(ImageFilter.GaussianBlur(rng.uniform(0.005, 0.04) * size))


DRAWN: tuple[Callable[[int, np.random.Generator], Image.Image], ...] = (_plain, _gradient, _noise, _pattern, _shapes)


def _octaves(size: int, rng: np.random.Generator) -> np.ndarray:
    """float32 (size, size): random grids, each twice as fine as the one before and weaker."""
    cells, falloff = int(rng.integers(2, 6)), rng.uniform(0.4, 1.0)
    total, weight = np.zeros((size, size), dtype=np.float32), 1.0
    while cells <= size and weight > 0.05:
        grid = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
        total += weight * np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))
        cells, weight = 2 * cells, weight * falloff
    return total


def _between(position: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """(H, W), lowest to highest, as one colour to another."""
    share = (position - position.min()) / max(np.ptp(position), 1e-6)
    first, last = np.array(colour(rng)), np.array(colour(rng))
    return _to_image(first + share[..., None] * (last - first))


def _to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
