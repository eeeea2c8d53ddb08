"""From uint8 images to what the Inception network was given: a resize to 299x299 by name, then (x - 128) / 128.

A resize that treats every row and every column alike is one product with a small matrix for each axis. The matrices are
made once per image size, and the products run on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

INPUT_SIZE = 299  # pixels
SMALLEST_SIDE = 8  # pixels; what is smaller than this shows nothing that features could tell apart


def tf1_matrix(input_size: int, output_size: int) -> Tensor:
    """The bilinear resize of TensorFlow 1, `tf.image.resize_bilinear(align_corners=False)`, with which FID was defined.

    There is no half-pixel shift and no antialiasing: output pixel i samples the input at i * input_size / output_size.
    Returns float64 (output_size, input_size): row i holds the weights of the input pixels that output pixel i mixes.
    """
    position = torch.arange(output_size, dtype=torch.float64) * (input_size / output_size)
    lower = position.floor().long()
    upper = (lower + 1).clamp(max=input_size - 1)
    fraction = position - lower
    output = torch.arange(output_size)
    matrix = torch.zeros(output_size, input_size, dtype=torch.float64)
    matrix[output, lower] += 1 - fraction
    matrix[output, upper] += fraction
    return matrix


def clean_matrix(input_size: int, output_size: int) -> Tensor:
    """Pillow's antialiased bicubic resize, as clean-fid uses it (Parmar et al. 2022, arXiv:2104.11222).

    Read off Pillow itself: the columns of the resized identity are the weights. Returns float64 (output_size,
    input_size).
    """
    identity = Image.fromarray(np.eye(input_size, dtype=np.float32))
    columns = identity.resize((output_size, input_size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(columns).T.astype(np.float64))


MATRICES: dict[str, Callable[[int, int], Tensor]] = {"tf1": tf1_matrix, "clean": clean_matrix}
PREPROCESSINGS = (*MATRICES, "none")


def preprocess(images: Tensor, name: str = "tf1") -> Tensor:
    """uint8 images (N, H, W, 3) to the network's input, float32 (N, 3, 299, 299) in channels_last.

    Args:
        images: of any size; with `none`, of 299x299.
        name: `tf1` (the literature's bilinear resize), `clean` (antialiased bicubic) or `none`.

    Raises:
        ValueError: `none` for images of another size.
    """
    x = images.permute(0, 3, 1, 2).float()
    if name != "none":
        x = resize(x, INPUT_SIZE, name)
    elif x.shape[-2:] != (INPUT_SIZE, INPUT_SIZE):
        raise ValueError(f"without preprocessing, images must be {INPUT_SIZE}x{INPUT_SIZE}, not {tuple(x.shape[-2:])}")
    return ((x - 128) / 128).contiguous(memory_format=torch.channels_last)


def resize(x: Tensor, size: int, name: str) -> Tensor:
    """float (N, C, H, W) on [0, 255] to (N, C, size, size), by the matrices of `name`."""
    height, width = x.shape[-2:]
    rows, columns = (_matrix(name, side, size, x.device, x.dtype) for side in (height, width))
    # The range is that of the input; only a bicubic filter, which overshoots, leaves it.
    return (rows @ (x @ columns.T)).clamp_(0, 255)


@lru_cache(maxsize=64)
def _matrix(name: str, input_size: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return MATRICES[name](input_size, size).to(device, dtype)
