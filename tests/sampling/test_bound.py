"""The bound of a trained model on a set of images."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import improved_diffusion
from improved_diffusion.data import open_image_set
from improved_diffusion.errors import UserError
from improved_diffusion.sampling.bound import bound_on_images, bound_rows, has_bound


@pytest.fixture(scope="module")
def model(tiny_run):
    return improved_diffusion.load(tiny_run)


def test_an_image_has_the_same_bound_whatever_is_beside_it(model, tiny_set):
    images = open_image_set(tiny_set)
    rows = bound_rows(images, 5)
    assert rows[0] == 0
    assert rows[-1] == 35
    whole = bound_on_images(model, images, rows)
    assert whole.vlb.shape == (5, 20)
    torch.testing.assert_close(whole.total, whole.vlb.sum(1) + whole.prior)
    some = bound_on_images(model, images, rows[[3, 1, 0]], batch_size=2)
    torch.testing.assert_close(some.total, whole.total[[3, 1, 0]], rtol=1e-4, atol=1e-4)
    assert bound_on_images(model, images, rows[:1], steps=4).vlb.shape == (1, 4)


def test_what_it_cannot_be_of_is_refused(model, tiny_set):
    images = open_image_set(tiny_set)
    for n in (0, 37):
        with pytest.raises(UserError, match=f"36 images of .*, not of {n}"):
            bound_rows(images, n)
    smaller = dataclasses.replace(images, images=images.images[:, :8, :8])
    with pytest.raises(UserError, match="are 8x8, those of .* are 16x16"):
        bound_on_images(model, smaller, np.arange(1))
    diffusion = dataclasses.replace(model.config.diffusion, variance="learned_range")
    untrained = dataclasses.replace(model, config=dataclasses.replace(model.config, loss="mse", diffusion=diffusion))
    with pytest.raises(UserError, match="has no bound"):
        bound_on_images(untrained, images, np.arange(1))
    renamed = dataclasses.replace(images, class_names=("a", "b", "c"))
    with pytest.raises(UserError, match="the classes of"):
        bound_on_images(model, renamed, np.arange(1))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--loss=mse"], True),
        (["--loss=hybrid"], True),
        (["--loss=mse", "--diffusion.variance=learned_range"], False),  # which nothing has trained
        (["--loss=mse", "--diffusion.timesteps=null"], False),
    ],
)
def test_there_is_a_bound_where_there_are_steps_and_a_variance(tiny_config, flags, expected):
    assert has_bound(tiny_config(*flags)) == expected
