from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from improved_diffusion.personalize.data.crops import Crop, buckets, choose_bucket, cut, variants


def ramp(width: int, height: int) -> Image.Image:
    """Red rises from left to right, green from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).round().astype(np.uint8))


@pytest.mark.parametrize("resolution", [256, 512, 1024])
def test_buckets_are_of_about_one_area(resolution):
    assert buckets(resolution, elongated=False) == [(resolution, resolution)]
    sizes = buckets(resolution, elongated=True)
    assert (resolution, resolution) in sizes
    assert len(sizes) > 2
    for height, width in sizes:
        assert height % 64 == width % 64 == 0
        assert 0.7 * resolution**2 < height * width <= resolution**2
        assert 0.5 <= height / width <= 2
        assert (width, height) in sizes


def test_an_image_goes_where_it_loses_least():
    sizes = buckets(512, elongated=True)
    assert choose_bucket(700, 700, sizes) == (512, 512)
    height, width = choose_bucket(1600, 1000, sizes)
    assert width / height == pytest.approx(1.6, rel=0.15)
    assert choose_bucket(1000, 1600, sizes) == (width, height)
    assert choose_bucket(5000, 100, sizes)[0] == min(size[0] for size in sizes)


@settings(deadline=None, max_examples=50)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    position=st.floats(0, 1),
    flip=st.booleans(),
    size=st.sampled_from([(64, 64), (64, 128), (128, 64)]),
)
def test_crops_have_the_size_and_lie_within(width, height, position, flip, size):
    crop = cut(ramp(width, height), size, position, flip)
    assert crop.pixels.shape == (3, *size)
    assert -1 <= crop.pixels.min() <= crop.pixels.max() <= 1
    assert crop.original_size == (height, width)
    assert crop.size_ids.tolist() == [height, width, *crop.top_left, *size]
    scale = max(size[1] / width, size[0] / height)
    assert crop.top_left[0] + size[0] <= max(size[0], round(height * scale))
    assert crop.top_left[1] + size[1] <= max(size[1], round(width * scale))
    assert min(crop.top_left) == 0  # only one side is too long


def test_the_crop_is_where_it_says():
    left, right = (cut(ramp(128, 64), (64, 64), position, flip=False) for position in (0, 1))
    assert (left.top_left, right.top_left) == ((0, 0), (0, 64))
    assert left.pixels[0].max() < 0.05 < right.pixels[0].max()
    mirrored = cut(ramp(128, 64), (64, 64), 0, flip=True)
    assert mirrored.top_left == (0, 0)
    np.testing.assert_allclose(mirrored.pixels, right.pixels.flip(2), atol=1e-6)


def crops_of(image: Image.Image, crops: int, flip: bool) -> list[Crop]:
    return [cut(image, (64, 64), *variant) for variant in variants(crops, flip)]


def test_several_crops_and_flips():
    assert [crop.top_left[1] for crop in crops_of(ramp(128, 64), 3, flip=False)] == [0, 32, 64]
    assert [crop.top_left[1] for crop in crops_of(ramp(128, 64), 1, flip=True)] == [32, 32]
    crops = crops_of(ramp(128, 64), 2, flip=True)
    assert len(crops) == 4
    assert len({crop.pixels.numpy().tobytes() for crop in crops}) == 4
