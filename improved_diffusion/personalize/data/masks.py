"""Masks: what of each image counts in the loss, from files or from the image's own transparency."""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from improved_diffusion.data.decode import EXTENSIONS, decode_upright, to_grey, to_rgba
from improved_diffusion.errors import UserError
from improved_diffusion.personalize.data.captioned import MASK, CaptionedImage, CaptionedSet
from improved_diffusion.personalize.data.crops import fit
from improved_diffusion.personalize.data_config import ImagesConfig


def with_masks(found: CaptionedSet, config: ImagesConfig) -> CaptionedSet:
    """The images, each with its mask where `config` wants masks.

    Raises:
        UserError: an image has no mask, or one of another size, that cannot be read, or that leaves nothing of it; or
            the images lie in a parquet file, beside which there are no masks.
    """
    if config.alpha_mask:
        return replace(found, images=tuple(replace(i, mask=functools.partial(_alpha, i)) for i in found.images))
    if not config.masked_loss:
        return found
    places = [_place_of(image, found.path, config.conditioning_data_dir) for image in found.images]
    files = [_file_at(place) for place in places]
    if None in files:
        first = files.index(None)
        raise UserError(
            f"{files.count(None)} of {len(found)} images have no mask, {found.images[first].name} for one: draw "
            f"{places[first]}.png, white where the image counts, or leave out images.masked_loss"
        )
    for image, file in zip(found.images, files, strict=True):
        _require_mask(image, file)
    pairs = zip(found.images, files, strict=True)
    return replace(found, images=tuple(replace(image, mask=functools.partial(_read, file)) for image, file in pairs))


def latent_mask(
    image: CaptionedImage, size: tuple[int, int], position: float, flip: bool, shape: Collection[int]
) -> Tensor:
    """The mask of a crop of `image`, see `fit`, as the mean of the pixels that each latent stands for.

    Args:
        shape: (height, width) of the latents.

    Returns:
        float32 (1, height, width) on [0, 1]; ones where the image has no mask.
    """
    if image.mask is None:
        return torch.ones(1, *shape)
    fitted, _ = fit(image.mask(), size, position, flip)
    pixels = torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255)
    return F.interpolate(pixels[None, None], size=tuple(shape), mode="area")[0]


def _place_of(image: CaptionedImage, path: Path, folder: str | None) -> Path:
    """Of the mask, without its ending: `a.mask` beside `a.jpg`, or `a` in a `folder` of masks."""
    if not (path / image.name).is_file():
        raise UserError(f"{path} is no folder of image files, so that no masks lie beside them: use images.alpha_mask")
    stem = PurePosixPath(image.name).with_suffix("")
    return path / f"{stem}{MASK}" if folder is None else Path(folder) / stem


def _file_at(place: Path) -> Path | None:
    files = (place.with_name(place.name + suffix) for suffix in sorted(EXTENSIONS))
    return next((file for file in files if file.is_file()), None)


def _require_mask(image: CaptionedImage, file: Path) -> None:
    try:
        mask = _read(file)
    except Exception as error:  # Pillow raises almost anything on a damaged file
        raise UserError(f"cannot read the mask {file}: {' '.join(str(error).split())}") from error
    if mask.size != image.size:
        (width, height), (own_width, own_height) = mask.size, image.size
        raise UserError(
            f"the mask {file} is {width} x {height} pixels large, and {image.name} {own_width} x {own_height}: they "
            "must be of one size"
        )
    if mask.getextrema()[1] == 0:
        raise UserError(f"the mask {file} is black all over: nothing of {image.name} would be learned")


def _read(file: Path) -> Image.Image:
    return decode_upright(file.read_bytes(), to_grey)


def _alpha(image: CaptionedImage) -> Image.Image:
    return decode_upright(image.read(), to_rgba).getchannel("A")
