"""The bilinear resize of TensorFlow 1, which FID's reference preprocessing used and later libraries do not have."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def resize_bilinear_tf1(images: Tensor, size: int) -> Tensor:
    """Resize as `tf.image.resize_bilinear(align_corners=False)` did in TensorFlow 1.

    There is no half-pixel shift and no antialiasing: output pixel i samples the input at i * input_size / size. That
    is a linear map along each axis, so two products with small matrices do it, on any device.

    Args:
        images: float (N, C, H, W).
        size: output height and width, in pixels.

    Returns:
        (N, C, size, size), of the dtype and on the device of `images`.
    """
    height, width = images.shape[-2:]
    rows = interpolation_matrix(height, size).to(images)
    columns = interpolation_matrix(width, size).to(images)
    return rows @ (images @ columns.T)


@lru_cache(maxsize=64)
def interpolation_matrix(input_size: int, output_size: int) -> Tensor:
    """float64 (output_size, input_size): row i holds the weights of the two input pixels that output pixel i mixes."""
    position = torch.arange(output_size, dtype=torch.float64) * (input_size / output_size)
    lower = position.floor().long()
    upper = (lower + 1).clamp(max=input_size - 1)
    fraction = position - lower
    output = torch.arange(output_size)
    matrix = torch.zeros(output_size, input_size, dtype=torch.float64)
    matrix[output, lower] += 1 - fraction
    matrix[output, upper] += fraction
    return matrix
