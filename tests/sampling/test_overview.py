"""The picture of a folder of samples stays one that can be looked at, and shows real images beside them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.data import open_image_set
from improved_diffusion.data.labelled_files import labelled_folder
from improved_diffusion.data.packing import pack
from improved_diffusion.sampling import overview
from improved_diffusion.sampling.loading import load


@pytest.fixture
def sample(tiny_run, run_script, tmp_path):
    """Run sample.py; what it printed and the grid."""

    def run(*flags: object):
        common = ["--run", tiny_run, "--sampler", "ddim", "--sampling-steps", 1, "--out", tmp_path / "out"]
        return run_script("sample.py", *common, *flags)

    return run


def make_set(folder, size: int, names: tuple[str, ...]):
    for name in names:
        for number in range(2):
            file = folder / "files" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((size, size, 3), 40 + number, np.uint8)).save(file)
    pack(labelled_folder(folder / "files"), folder / "set", size, workers=1)
    return folder / "set"


def test_few_images_of_few_classes_are_shown(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(overview, "COLUMNS", 2)
    monkeypatch.setattr(overview, "SIDE", 40)  # of images of 16x16: two
    outcome = sample("--n", 3)
    assert outcome.code == 0, outcome.err
    assert "out.png (2 of 3 images a class, 2 of 3 classes)" in outcome.out
    grid = np.asarray(Image.open(tmp_path / "out.png"))
    assert grid.shape[0] == 2 * 16
    shown = [[np.asarray(Image.open(tmp_path / "out" / name / f"seed0_{i:06d}.png")) for i in range(2)] for name in
             ("apple_pie", "creme_brulee")]  # fmt: skip
    np.testing.assert_array_equal(grid[:, -32:], np.concatenate([np.concatenate(row, axis=1) for row in shown]))


def test_a_picture_that_lies_there_is_not_replaced(sample, tmp_path):
    (tmp_path / "out.png").write_text("a photograph")
    refused = sample("--n", 1)
    assert refused.is_one_clear_line(), refused
    assert f"{tmp_path / 'out.png'}, where the grid would go" in refused.err
    assert (tmp_path / "out.png").read_text() == "a photograph"
    assert not (tmp_path / "out").exists()
    assert sample("--n", 1, "--overwrite").code == 0
    assert sample("--n", 1).code == 0  # the grid is its own now


def test_one_class_alone_is_a_square(sample, tmp_path):
    outcome = sample("--n", 5, "--class", "waffles")
    assert outcome.code == 0, outcome.err
    grid = np.asarray(Image.open(tmp_path / "out.png"))
    images = [np.asarray(Image.open(tmp_path / "out" / "waffles" / f"seed0_{i:06d}.png")) for i in range(5)]
    rows = [np.concatenate(row, axis=1) for row in (images[:3], [*images[3:], np.full_like(images[0], 255)])]
    np.testing.assert_array_equal(grid[:, -48:], np.concatenate(rows))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--n", 2], "(2 images a class, 3 classes)"),
        (["--n", 17, "--class", "waffles"], "(16 of 17 images)"),
    ],
)
def test_the_line_says_what_is_shown(sample, flags, words):
    outcome = sample(*flags)
    assert words in outcome.out, outcome


def test_real_images_are_to_the_right(sample, tiny_set, tmp_path):
    plain = sample("--n", 2)
    assert plain.code == 0, plain.err
    alone = np.asarray(Image.open(tmp_path / "out.png"))
    outcome = sample("--n", 2, "--beside", tiny_set / "test")
    assert outcome.code == 0, outcome.err
    grid = np.asarray(Image.open(tmp_path / "out.png"))
    width = alone.shape[1]
    np.testing.assert_array_equal(grid[:, :width], alone)
    assert (grid[:, width:-32] == 255).all()  # the gap
    assert grid.shape[1] - 32 - width >= 8
    real = open_image_set(tiny_set / "test")
    for row, name in enumerate(real.class_names):
        expected = real.images[real.labels == real.class_names.index(name)][:2]
        np.testing.assert_array_equal(grid[16 * row : 16 * row + 16, -32:], np.concatenate(list(expected), axis=1))


def test_a_class_is_found_by_its_name(sample, tmp_path):
    other = make_set(tmp_path, 16, ("aardvark", "waffles"))
    outcome = sample("--n", 3, "--class", "waffles", "--beside", other)
    assert outcome.code == 0, outcome.err
    grid = np.asarray(Image.open(tmp_path / "out.png"))
    assert grid[0, -48:, 0].tolist() == [40] * 16 + [41] * 16 + [255] * 16  # two are there


@pytest.mark.parametrize(
    ("size", "names", "words"),
    [
        (16, ("apple_pie", "waffles"), "no image of the class 'creme_brulee'"),
        (8, ("apple_pie", "creme_brulee", "waffles"), "images of 8x8 pixels, and the model draws 16x16"),
    ],
)
def test_a_set_that_does_not_fit_is_refused_before_anything_is_drawn(sample, tmp_path, size, names, words):
    refused = sample("--beside", make_set(tmp_path, size, names))
    assert refused.is_one_clear_line(), refused
    assert words in refused.err
    assert not (tmp_path / "out").exists()


def test_a_set_that_is_not_there_is_refused(sample, tmp_path):
    assert sample("--beside", tmp_path / "nowhere").is_one_clear_line()


def test_without_classes_any_images_are_shown(tiny_run, tiny_set):
    model = load(tiny_run, device="cpu")
    unclassed = dataclasses.replace(model.config.model, class_conditional=False, class_dropout=0.0)
    config = dataclasses.replace(model.config, model=unclassed)
    unconditional = dataclasses.replace(model, config=config)
    shown = overview.Overview(unconditional, unconditional.keys(None, 3, seed=0), tiny_set / "test")
    assert shown.caption == "3 images"
    images = open_image_set(tiny_set / "test").images
    np.testing.assert_array_equal(shown.real, images[None, [0, 18, 35]])
