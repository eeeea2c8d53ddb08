"""Images of the class: seeded, resumable, kept, and never those of another setting."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.errors import UserError

pytest.importorskip("diffusers")
from improved_diffusion.personalize.config import PersonalizeConfig, PriorConfig, SubjectConfig  # noqa: E402
from improved_diffusion.personalize.models.base import load_base  # noqa: E402
from improved_diffusion.personalize.training.prior import prior_images  # noqa: E402


@pytest.fixture
def config(tiny_bases, tmp_path, monkeypatch) -> PersonalizeConfig:
    monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    return PersonalizeConfig(
        base=str(tiny_bases["sd"]),
        subject=SubjectConfig(token="sks", class_name="dog"),
        prior=PriorConfig(images=3, steps=2),
    )


def pixels(found) -> np.ndarray:
    return np.stack([np.asarray(image.load(), dtype=np.int16) for image in found.images])


def test_interrupted_it_draws_only_what_is_missing(config):
    base = load_base(config.base)
    whole = prior_images(base, "base", config, 64)
    expected = pixels(whole)
    kept = {file: file.stat().st_mtime_ns for file in whole.path.glob("*.png")}
    (whole.path / "00001.png").unlink()
    again = pixels(prior_images(base, "base", config, 64))
    assert np.abs(again - expected).max() <= 1  # drawn alone, and not in a batch of three
    assert {file for file, time in kept.items() if file.stat().st_mtime_ns != time} == {whole.path / "00001.png"}
    assert len({picture.tobytes() for picture in expected}) == 3


def test_more_are_added_to_those_that_are_there(config):
    base = load_base(config.base)
    three = pixels(prior_images(base, "base", config, 64))
    five = dataclasses.replace(config, prior=dataclasses.replace(config.prior, images=5))
    assert np.array_equal(pixels(prior_images(base, "base", five, 64))[:3], three)
    assert np.array_equal(pixels(prior_images(base, "base", config, 64)), three)


def test_a_damaged_image_is_named(config):
    base = load_base(config.base)
    damaged = prior_images(base, "base", config, 64).path / "00001.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UserError, match="00001.png.*remove the file, and it is drawn anew"):
        prior_images(base, "base", config, 64)


def test_a_folder_of_ones_own_is_taken_as_it_is(config, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (80, 64), (number, 0, 0)).save(folder / f"{number}.jpg")
    own = dataclasses.replace(config, prior=dataclasses.replace(config.prior, path=str(folder)))
    assert [image.name for image in prior_images(None, "base", own, 64).images] == ["0.jpg", "1.jpg", "2.jpg"]
    more = dataclasses.replace(own, prior=dataclasses.replace(own.prior, images=9))
    with pytest.raises(UserError, match="prior.images is 9 and .* holds 4"):
        prior_images(None, "base", more, 64)


def test_images_of_another_prompt_are_not_taken_for_these(config, tmp_path):
    path = str(tmp_path / "prior")
    base = load_base(config.base)
    here = dataclasses.replace(config, prior=dataclasses.replace(config.prior, path=path))
    prior_images(base, "base", here, 64)
    other = dataclasses.replace(here, subject=SubjectConfig(token="sks", class_name="cat"))
    with pytest.raises(UserError, match="drawn with prompt 'a photo of a dog', not 'a photo of a cat': choose ano"):
        prior_images(base, "base", other, 64)
