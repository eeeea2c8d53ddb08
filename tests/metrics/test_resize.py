from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from improved_diffusion.metrics.resize import resize_bilinear_tf1


def tf1_pixel(image: np.ndarray, i: int, j: int, size: int) -> float:
    """One pixel of TensorFlow 1's resize_bilinear(align_corners=False) of a (H, W) image."""
    height, width = image.shape
    y, x = i * height / size, j * width / size
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
    lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
    return upper + (lower - upper) * (y - top)


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    size=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_every_pixel_is_tensorflows(height, width, size, seed):
    image = np.random.default_rng(seed).uniform(0, 255, (height, width))
    resized = resize_bilinear_tf1(torch.from_numpy(image)[None, None], size)[0, 0]
    expected = [[tf1_pixel(image, i, j, size) for j in range(size)] for i in range(size)]
    np.testing.assert_allclose(resized, expected, atol=1e-10)


def test_an_image_of_the_size_asked_for_stays_as_it_is():
    image = torch.rand(2, 3, 299, 299)
    assert torch.equal(resize_bilinear_tf1(image, 299), image)


@pytest.mark.parametrize("size", [32, 64, 512])
def test_the_corner_convention_is_not_that_of_half_pixels(size):
    ramp = torch.arange(size, dtype=torch.float64).expand(1, 1, size, size)
    expected = (torch.arange(299, dtype=torch.float64) * size / 299).clamp(max=size - 1)
    torch.testing.assert_close(resize_bilinear_tf1(ramp, 299)[0, 0, 0], expected)
    half_pixel = torch.nn.functional.interpolate(ramp, 299, mode="bilinear", align_corners=False)[0, 0, 0]
    assert (half_pixel - expected).abs().max() > 0.1
