"""The strip of the reverse process ends in the image itself."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import improved_diffusion
from improved_diffusion.sampling.generate import SampleKey
from improved_diffusion.sampling.model import change_sampling
from improved_diffusion.sampling.strip import draw_strip, reverse_process


@pytest.fixture(scope="module")
def model(tiny_run):
    return improved_diffusion.load(tiny_run)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "heun", "dpmpp_2m"])
def test_the_last_estimate_is_the_image(model, sampler):
    sampling = change_sampling(model.config.sampling, sampler=sampler, steps=4, batch_size=2)
    keys = model.keys(None, 1, seed=0)  # three: the second batch is filled up
    images, steps = reverse_process(model, keys, sampling, moments=3)
    assert steps == (1, 2, 4)
    assert images.shape == (3, 3, 16, 16, 3)
    drawn = model.sample(sampler=sampler, steps=4, batch_size=2, show_progress=False)
    assert np.abs(images[:, -1].astype(int) - drawn.astype(int)).max() <= 1  # the last step rounds once more
    assert (images[:, 0] != images[:, -1]).any()


def test_there_are_no_more_moments_than_steps(model):
    images, steps = reverse_process(model, [SampleKey(0, 1, 0)], change_sampling(model.config.sampling, steps=2))
    assert steps == (1, 2)
    assert images.shape == (1, 2, 16, 16, 3)


def test_a_row_for_the_first_image_of_each_class(model):
    sampling = change_sampling(model.config.sampling, sampler="ddim", steps=2)
    picture = draw_strip(model, model.keys(["waffles", "apple_pie"], 3, seed=0), sampling)
    assert picture.shape[0] == 18 + 2 * 16
    again = draw_strip(model, model.keys(["waffles", "apple_pie"], 1, seed=0), sampling)
    assert (picture == again).all()


def test_sample_py_writes_it_beside_the_folder(tiny_run, run_script, tmp_path):
    few = ("--n", 1, "--sampling-steps", 2, "--out", tmp_path / "out")
    outcome = run_script("sample.py", "--run", tiny_run, *few, "--strip")
    assert outcome.code == 0, outcome.err
    assert str(tmp_path / "out_strip.png") in outcome.out
    assert Image.open(tmp_path / "out_strip.png").height == 18 + 3 * 16
