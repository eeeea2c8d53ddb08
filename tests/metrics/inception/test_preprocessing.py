from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from improved_diffusion.metrics.inception.preprocessing import PREPROCESSINGS, preprocess, resize


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
    resized = resize(torch.from_numpy(image)[None, None], size, "tf1")[0, 0]
    expected = [[tf1_pixel(image, i, j, size) for j in range(size)] for i in range(size)]
    np.testing.assert_allclose(resized, expected, atol=1e-10)


def test_an_image_of_the_size_asked_for_stays_as_it_is():
    image = 255 * torch.rand(2, 3, 299, 299)
    assert torch.equal(resize(image, 299, "tf1"), image)


@pytest.mark.parametrize("size", [32, 64, 512])
def test_the_corner_convention_is_not_that_of_half_pixels(size):
    ramp = torch.arange(size, dtype=torch.float64).expand(1, 1, size, size) * 255 / size
    expected = (torch.arange(299, dtype=torch.float64) * size / 299).clamp(max=size - 1) * 255 / size
    torch.testing.assert_close(resize(ramp, 299, "tf1")[0, 0, 0], expected)
    half_pixel = torch.nn.functional.interpolate(ramp, 299, mode="bilinear", align_corners=False)[0, 0, 0]
    assert (half_pixel - expected).abs().max() > 0.1 * 255 / size


def clean_fid_resize(image: np.ndarray) -> np.ndarray:
    """What clean-fid does: Pillow's bicubic, channel by channel in float, clipped; (H, W, 3) to float (299, 299, 3)."""
    channels = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(channel.resize((299, 299), Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(resized, axis=-1).clip(0, 255)


@pytest.mark.parametrize("shape", [(64, 64), (32, 48), (299, 299), (512, 340), (640, 1000)])
def test_clean_is_pillows_bicubic(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = torch.from_numpy(clean_fid_resize(image)).permute(2, 0, 1)
    actual = preprocess(torch.from_numpy(image)[None], "clean")[0] * 128 + 128
    assert (actual - expected).abs().max() < 1e-3  # of a grey level; without the clip it would be tens


def test_none_takes_images_of_299_pixels_as_they_are():
    image = torch.randint(0, 256, (1, 299, 299, 3), dtype=torch.uint8)
    expected = (image.float().permute(0, 3, 1, 2) - 128) / 128
    for name in PREPROCESSINGS:
        assert torch.allclose(preprocess(image, name), expected)
    with pytest.raises(ValueError, match="299x299"):
        preprocess(image[:, :64], "none")
