"""Images are moved as the parameters say, and what is done to them is all in the parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from improved_diffusion.data.augmentation import augment, draw_parameters
from improved_diffusion.models.backbone import AUGMENTATION_PARAMETERS

MIRRORED, UPSIDE_DOWN, SIZE, TURNED_COS, TURNED_SIN, STRETCH_COS, STRETCH_SIN, SHIFT_X, SHIFT_Y = range(9)


def images(n: int = 1, channels: int = 3, height: int = 32, width: int = 32) -> torch.Tensor:
    """Smooth random images, so that a resampling's kernel matters little."""
    noise = np.random.default_rng(0).standard_normal((n, channels, height, width))
    smooth = scipy.ndimage.gaussian_filter(noise, (0, 0, 3, 3), mode="mirror")
    return torch.from_numpy(smooth / np.abs(smooth).max()).float()


def parameters(**values: float) -> torch.Tensor:
    row = torch.zeros(1, AUGMENTATION_PARAMETERS)
    for name, value in values.items():
        row[0, globals()[name]] = value
    return row


def test_nothing_to_do_changes_nothing():
    x = images(4)
    assert torch.equal(augment(x, torch.zeros(4, AUGMENTATION_PARAMETERS)), x)
    assert not draw_parameters(100, 0.0, torch.Generator().manual_seed(0)).any()


def test_flips_quarter_turns_and_whole_shifts_are_exact():
    x = images()
    assert torch.equal(augment(x, parameters(MIRRORED=1)), x.flip(3))
    assert torch.equal(augment(x, parameters(UPSIDE_DOWN=1)), x.flip(2))
    quarter = augment(x, parameters(TURNED_COS=-1, TURNED_SIN=1))  # clockwise, for y points down
    torch.testing.assert_close(quarter, x.rot90(-1, (2, 3)), rtol=0, atol=1e-4)
    shifted = augment(x, parameters(SHIFT_X=1, SHIFT_Y=0.5))  # by an eighth of the side, and half of that
    torch.testing.assert_close(shifted[..., 2:, 4:], x[..., :-2, :-4], rtol=0, atol=1e-4)
    torch.testing.assert_close(shifted[..., :2, 4:], x[..., :2, :-4].flip(2), rtol=0, atol=1e-4)  # reflected


@settings(max_examples=20, deadline=None)
@given(
    size=st.floats(-2, 2),
    angle=st.floats(-math.pi, math.pi),
    axis=st.floats(-math.pi / 2, math.pi / 2),
    stretch=st.floats(-2, 2),
    shift_x=st.floats(-1, 1),
    shift_y=st.floats(-1, 1),
)
def test_as_scipy_moves_it(size, angle, axis, stretch, shift_x, shift_y):
    height, width = 32, 48
    x = images(height=height, width=width)
    ours = augment(
        x,
        parameters(
            SIZE=size,
            TURNED_COS=math.cos(angle) - 1,
            TURNED_SIN=math.sin(angle),
            STRETCH_COS=stretch * math.cos(2 * axis),
            STRETCH_SIN=stretch * math.sin(2 * axis),
            SHIFT_X=shift_x,
            SHIFT_Y=shift_y,
        ),
    )

    def rotation(a: float) -> np.ndarray:
        return np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])

    along = rotation(axis) @ np.diag([2 ** (0.2 * stretch), 2 ** (-0.2 * stretch)]) @ rotation(-axis)
    forward = along @ rotation(angle) * 2 ** (0.2 * size)  # of (x, y)
    inverse = np.linalg.inv(forward)[::-1, ::-1]  # of (y, x), from the result to the image
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    shift = np.array([height * shift_y, width * shift_x]) / 8
    offset = centre - inverse @ (centre + shift)
    for channel, expected in zip(ours[0].numpy(), x[0].numpy(), strict=True):
        moved = scipy.ndimage.affine_transform(expected, inverse, offset, order=3, mode="reflect")
        np.testing.assert_allclose(channel, np.clip(moved, -1, 1), atol=0.03)


def test_each_is_done_to_the_share_of_images_asked_for():
    drawn = draw_parameters(20_000, 0.15, torch.Generator().manual_seed(0))
    done = (drawn != 0).double().mean(0)
    for name in (SIZE, TURNED_SIN, STRETCH_SIN, SHIFT_X, SHIFT_Y):
        assert done[name].item() == pytest.approx(0.15, abs=0.01)
    assert done[UPSIDE_DOWN].item() == pytest.approx(0.075, abs=0.01)
    assert done[MIRRORED].item() == pytest.approx(0.5, abs=0.015)
    torch.testing.assert_close((drawn[:, TURNED_COS] + 1).square() + drawn[:, TURNED_SIN].square(), torch.ones(20_000))
    assert drawn[:, SIZE][drawn[:, SIZE] != 0].std().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(drawn, draw_parameters(20_000, 0.15, torch.Generator().manual_seed(0)))


def test_what_hides_under_transparent_pixels_does_not_bleed():
    x = -torch.ones(1, 4, 32, 32)
    x[:, 1] = 1  # green, where nothing is to be seen
    x[:, :, 8:24, 8:24] = torch.tensor([1.0, -1, -1, 1])[:, None, None]  # opaque red
    moved = augment(x, parameters(SIZE=0.3, TURNED_COS=math.cos(0.3) - 1, TURNED_SIN=math.sin(0.3)))
    visible = moved[0, 3] > -0.9
    assert visible.sum() > 200
    assert moved[0, 1][visible].max() < -0.99
    assert moved[0, 0][visible].min() > 0.5
