"""The text that each image is learned with."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import PersonalizeConfig, SubjectConfig
from improved_diffusion.personalize.data.learned import open_images


@pytest.fixture
def texts_of(tmp_path):
    """The texts of two images, of which one has a caption, with a subject."""
    for number in range(2):
        Image.fromarray(np.full((8, 8, 3), 90 * number, np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "0.txt").write_text("on a lawn")

    def texts(**subject) -> tuple[str, ...]:
        settings = SubjectConfig(**{"token": "sks", "class_name": "dog", **subject})
        return open_images(PersonalizeConfig(data=str(tmp_path), subject=settings)).training.texts

    return texts


def test_captions_as_they_are_and_the_prompt_for_what_has_none(texts_of):
    assert texts_of() == ("on a lawn", "a photo of sks dog")


def test_every_caption_can_name_the_subject(texts_of):
    assert texts_of(caption_prompt="{token} {class}, {caption}") == ("sks dog, on a lawn", "a photo of sks dog")
    with pytest.raises(UserError, match="has no {caption}"):
        SubjectConfig(caption_prompt="a {class}")
