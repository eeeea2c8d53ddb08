"""The text that each image is learned with."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import (
    ConceptConfig,
    ImagesConfig,
    PersonalizeConfig,
    SubjectConfig,
)
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


def test_braces_in_a_caption_are_text(texts_of, tmp_path):
    (tmp_path / "0.txt").write_text("{{{masterpiece}}} :{ of {token} {class}")
    assert texts_of()[0] == "{{{masterpiece}}} :{ of sks dog"
    assert texts_of(caption_prompt="a {class}, {caption}")[0] == "a dog, {{{masterpiece}}} :{ of sks dog"


def test_each_concept_has_its_images_and_texts(texts_of, tmp_path):
    dog = ConceptConfig(str(tmp_path), token="sks", class_name="dog")
    cat = ConceptConfig(str(tmp_path), token="oue", class_name="cat", prompt="{token} {class}")
    one, both, other_order = (
        open_images(PersonalizeConfig(concepts=concepts, images=ImagesConfig(held_out=1)))
        for concepts in ((dog,), (dog, cat), (cat, dog))
    )
    assert both.training.concepts == (0, 1)
    assert both.training.of(0).texts == one.training.texts
    assert [image.name for image in both.training.images] == [one.training.images[0].name] * 2
    assert {both.training.of(1).texts, both.held_out.of(1).texts} == {("on a lawn",), ("oue cat",)}
    assert both.content_hash != one.content_hash
    assert other_order.training.of(1).texts == one.training.texts


def test_every_caption_can_name_the_subject(texts_of):
    assert texts_of(caption_prompt="{token} {class}, {caption}") == ("sks dog, on a lawn", "a photo of sks dog")
    with pytest.raises(UserError, match="has no {caption}"):
        SubjectConfig(caption_prompt="a {class}")
