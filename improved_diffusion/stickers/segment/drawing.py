"""Pictures to learn the cut-out from: a sticker placed on a background, and its alpha, drawn from a seed and an index.

The subject is the one large thing on top: what else is strewn about lies behind it, is less than half as large, and
counts as background.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from improved_diffusion.stickers.segment.pictures import Photographs, Picture
from improved_diffusion.stickers.segment.scenery import background, colour

TRAINING, ORDER, HELD_OUT = range(3)  # what a generator is for, beside the seed
LONGEST_SIDE = (0.4, 1.0)  # of a subject, as a share of the picture's
CLUTTER_SIDE = (0.1, 0.25)
CLUTTERED, MOST_CLUTTER = 0.2, 4  # share of the pictures, and things strewn about


def seeded(*key: int) -> np.random.Generator:
    """A generator that is a function of `key`; different keys are independent."""
    return np.random.default_rng(np.random.SeedSequence(key[0], spawn_key=key[1:]))


class TrainingPictures(torch.utils.data.Dataset):
    """Picture `index`, counted from 0 over all epochs: each subject comes once in an epoch, each time drawn anew.

    Returns uint8 tensors: the picture (3, size, size) and its alpha (size, size).
    """

    def __init__(self, pictures: Sequence[Picture], photographs: Photographs, size: int, seed: int):
        self.pictures, self.photographs, self.size, self.seed = pictures, photographs, size, seed

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        epoch, position = divmod(index, len(self.pictures))
        subject = self.pictures[_order(self.seed, epoch, len(self.pictures))[position]]
        drawn = draw(subject, self.pictures, self.photographs, self.size, seeded(self.seed, TRAINING, index))
        picture, alpha = (torch.from_numpy(np.array(image)) for image in drawn)
        return picture.permute(2, 0, 1).contiguous(), alpha


def held_out_picture(
    pictures: Sequence[Picture], number: int, photographs: Photographs, size: int, seed: int
) -> tuple[Image.Image, Image.Image]:
    """Picture and alpha (see `draw`) of subject `number` of those held out: the same for every model."""
    return draw(pictures[number], pictures, photographs, size, seeded(seed, HELD_OUT, number))


def draw(
    subject: Picture, others: Sequence[Picture], photographs: Photographs, size: int, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """A picture and its truth.

    Args:
        subject: what is to be cut out.
        others: what may be strewn about behind it.
        photographs: that may be behind both; there may be none.
        size: pixels a side.
        rng: decides everything.

    Returns:
        RGB and L, of `size` pixels a side.
    """
    scene = background(size, photographs, rng)
    if rng.random() < CLUTTERED:
        for _ in range(rng.integers(1, MOST_CLUTTER + 1)):
            small = _turned(others[rng.integers(len(others))].load(), rng.uniform(*CLUTTER_SIDE) * size, rng)
            scene.paste(small, tuple(int(rng.uniform(-0.5, 1) * size) for _ in range(2)), small)
    sticker = _recoloured(_turned(subject.load(), rng.uniform(*LONGEST_SIDE) * size, rng), rng)
    layer = Image.new("RGBA", (size, size))
    layer.paste(sticker, _place(sticker.size, size, rng))
    if rng.random() < 0.3:
        scene = _shadowed(scene, layer.getchannel("A"), rng)
    alpha = layer.getchannel("A")
    picture = Image.composite(layer.convert("RGB"), scene, alpha)
    if rng.random() < 0.2:  # out of focus, both alike
        blur = ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2) * size / 128)
        picture, alpha = picture.filter(blur), alpha.filter(blur)
    return _worn(picture, rng), alpha


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return seeded(seed, ORDER, epoch).permutation(count)


def _turned(sticker: Image.Image, side: float, rng: np.random.Generator) -> Image.Image:
    """Its longest side `side` pixels before it is stretched a little, mirrored and turned."""
    scale = side / max(sticker.size)
    stretch = 1.2 ** rng.uniform(-1, 1)
    width, height = sticker.width * scale * stretch, sticker.height * scale / stretch
    sticker = sticker.resize((max(1, round(width)), max(1, round(height))), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        sticker = ImageOps.mirror(sticker)
    if rng.random() < 0.5:
        sticker = sticker.rotate(rng.normal(0, 20), Image.Resampling.BICUBIC, expand=True)
    return sticker


def _place(sticker: tuple[int, int], size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Where its upper left corner comes: as a rule within the frame, where it fits, else partly beyond it."""
    beyond = 0.2 if rng.random() < 0.15 else 0.0
    left, top = (
        rng.uniform(-beyond * length, size - length + beyond * length) if length <= size else (size - length) / 2
        for length in sticker
    )
    return round(left), round(top)


def _recoloured(sticker: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Of other hues (channels exchanged), saturation and brightness, now and then: other styles have other colours."""
    colours, alpha = sticker.convert("RGB"), sticker.getchannel("A")
    if rng.random() < 0.3:
        channels = colours.split()
        colours = Image.merge("RGB", [channels[i] for i in rng.permutation(3)])
    if rng.random() < 0.3:
        colours = ImageEnhance.Color(colours).enhance(rng.uniform(0, 1.6))
    if rng.random() < 0.3:
        colours = ImageEnhance.Brightness(colours).enhance(rng.uniform(0.6, 1.4))
    colours.putalpha(alpha)
    return colours


def _shadowed(scene: Image.Image, alpha: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A soft shadow of the subject on the scene, which belongs to the background."""
    size = scene.width
    offset = (int(x) for x in rng.normal(0, 0.04, 2) * size)
    shadow = ImageChops.offset(alpha.filter(ImageFilter.GaussianBlur(rng.uniform(0.01, 0.05) * size)), *offset)
    strength = rng.uniform(0.2, 0.7)
    return Image.composite(Image.new("RGB", scene.size), scene, shadow.point(lambda value: value * strength))


def _worn(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """With what cameras and messengers do to a picture: light, noise, JPEG."""
    if rng.random() < 0.3:
        picture = ImageEnhance.Contrast(picture).enhance(rng.uniform(0.6, 1.3))
    if rng.random() < 0.2:
        picture = Image.blend(picture, Image.new("RGB", picture.size, colour(rng)), rng.uniform(0, 0.2))
    if rng.random() < 0.2:
        pixels = np.asarray(picture, dtype=np.float32)
        noisy = pixels + rng.uniform(2, 16) * rng.standard_normal(pixels.shape, dtype=np.float32)
        picture = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    if rng.random() < 0.4:
        stored = io.BytesIO()
        picture.save(stored, format="jpeg", quality=int(rng.integers(30, 96)))
        picture = Image.open(stored).convert("RGB")
    return picture
