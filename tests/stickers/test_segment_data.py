"""Pictures to learn the cut-out from: which are held out, and how they are drawn."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from improved_diffusion.data.names import base_name, is_held_out
from improved_diffusion.errors import UserError
from improved_diffusion.stickers.segment.drawing import TrainingPictures, draw, seeded
from improved_diffusion.stickers.segment.pictures import Photographs, joined, open_pictures
from improved_diffusion.stickers.segment.scenery import DRAWN, background

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


def write_set(folder: Path, names: list[str], colour: str = "red") -> Path:
    """Discs on transparent ground, 24x24, in one category, with their names in metadata.jsonl."""
    (folder / "things").mkdir(parents=True)
    lines = []
    for number, name in enumerate(names):
        picture = Image.new("RGBA", (24, 24))
        ImageDraw.Draw(picture).ellipse((4, 4, 12 + number % 8, 18), fill=colour)
        picture.save(folder / "things" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"things/{number}.png", "text": name}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def pictures(tmp_path):
    return open_pictures(write_set(tmp_path / "set", [f"thing {number}" for number in range(30)]))


@given(
    st.sampled_from(["waving hand", "ear", "person running", "mage"]),
    st.sampled_from(TONES),
    st.sampled_from(["{}: {} skin tone", "{}-{}-skin-tone", "woman {} {} skin tone", "{} {}_skin_tone facing right"]),
    st.floats(0.01, 0.99),
)
def test_skin_tones_and_sexes_of_one_emoji_are_on_one_side_of_the_split(name, tone, form, share):
    variant = form.format(name, tone)
    assert base_name(variant) == base_name(name)
    assert is_held_out(base_name(variant), share) == is_held_out(base_name(name), share)


def test_other_things_keep_names_of_their_own():
    names = ["light bulb", "dark chocolate", "keycap: 1", "keycap: 2", "man", "hairbrush"]
    assert [base_name(name) for name in names] == ["light bulb", "dark chocolate", "keycap 1", "keycap 2", *names[4:]]


def test_the_share_of_names_held_out_is_what_was_asked_for():
    held_out = [is_held_out(f"name {number}", 0.1) for number in range(4000)]
    assert 0.08 < np.mean(held_out) < 0.12


def test_no_base_name_is_on_both_sides_and_one_picture_stands_for_a_held_out_name(tmp_path):
    hands = [f"hand {n}: {tone} skin tone" for n in range(40) for tone in TONES]
    training, held_out = joined(
        [open_pictures(write_set(tmp_path / style, hands, colour)) for style, colour in (("a", "red"), ("b", "blue"))]
    ).split(0.3)
    assert not {one.base for one in training} & {one.base for one in held_out}
    assert len({one.base for one in training} | {one.base for one in held_out}) == 40
    assert len(held_out) == len({one.base for one in held_out}) > 0


def test_a_zip_holds_what_its_folder_holds_and_other_names_are_other_data(tmp_path):
    folder = write_set(tmp_path / "set", ["apple", "pear"])
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder))
    found = open_pictures(tmp_path / "set.zip")
    assert [one.base for one in found.pictures] == ["apple", "pear"]
    assert found.content_hash == open_pictures(folder).content_hash
    lines = (folder / "metadata.jsonl").read_text().replace("pear", "plum")
    (folder / "metadata.jsonl").write_text(lines)
    assert found.content_hash != open_pictures(folder).content_hash


def test_what_cannot_be_used_is_skipped_and_named(tmp_path):
    folder = write_set(tmp_path / "set", ["apple", "pear", "plum"])
    (folder / "things" / "0.png").write_bytes(b"no picture")
    Image.new("RGBA", (8, 8)).save(folder / "things" / "1.png")
    found = open_pictures(folder)
    assert [one.base for one in found.pictures] == ["plum"]
    assert [line.split(":")[0] for line in found.skipped] == ["things/0.png", "things/1.png"]


def test_photographs_are_no_pictures_with_alpha(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.png")
    with pytest.raises(UserError, match="no pictures with transparency"):
        open_pictures(tmp_path / "photos")


def test_a_picture_is_a_function_of_seed_and_index(pictures):
    def drawn(seed, index):
        picture, alpha = TrainingPictures(pictures.pictures, Photographs(()), 32, seed)[index]
        assert picture.shape == (3, 32, 32)
        assert alpha.shape == (32, 32)
        return picture.numpy().tobytes() + alpha.numpy().tobytes()

    assert drawn(0, 5) == drawn(0, 5)
    assert len({drawn(0, 5), drawn(0, 6), drawn(1, 5), drawn(0, 5 + len(pictures))}) == 4


def test_another_process_draws_the_same_picture(pictures, tmp_path, tiny_set):
    data = TrainingPictures(pictures.pictures, Photographs((str(tiny_set),)), 32, 0)
    assert torch.equal(pickle.loads(pickle.dumps(data))[5][0], data[5][0])


def test_an_epoch_has_every_subject_once(pictures, monkeypatch):
    subjects = []
    module = "improved_diffusion.stickers.segment.drawing"
    monkeypatch.setattr(f"{module}.draw", lambda subject, *_: subjects.append(subject) or [np.zeros((4, 4, 3))] * 2)
    data = TrainingPictures(pictures.pictures, Photographs(()), 4, 0)
    for index in range(2 * len(pictures)):
        data[index]
    first, second = subjects[: len(pictures)], subjects[len(pictures) :]
    assert {one.file for one in first} == {one.file for one in second} == {one.file for one in pictures.pictures}
    assert first != second


def test_the_truth_is_where_the_subject_is(tmp_path, monkeypatch):
    """On grey, nothing strewn about, shadowed or worn: the pixels that are not grey are those with alpha."""
    module = "improved_diffusion.stickers.segment.drawing"
    monkeypatch.setattr(f"{module}.background", lambda size, *_: Image.new("RGB", (size, size), (90, 90, 90)))
    monkeypatch.setattr(f"{module}._shadowed", lambda scene, *_: scene)
    monkeypatch.setattr(f"{module}._recoloured", lambda sticker, *_: sticker)
    monkeypatch.setattr(f"{module}._worn", lambda picture, *_: picture)
    monkeypatch.setattr(f"{module}.CLUTTERED", 0)
    (subject,) = open_pictures(write_set(tmp_path / "set", ["disc"])).pictures
    for seed in range(20):
        rng = seeded(seed)
        picture, alpha = (np.asarray(image, np.float64) for image in draw(subject, [subject], Photographs(()), 48, rng))
        share = alpha[..., None] / 255
        assert (
            np.abs(picture - (share * [255, 0, 0] + (1 - share) * 90)).max() <= 8
        )  # colours are kept multiplied by alpha on the way
        assert 100 < (alpha > 127).sum() < 48 * 48


def test_backgrounds_are_of_every_kind_and_of_photographs(tmp_path, tiny_set):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (20, 30), (10, 200, 30)).save(tmp_path / "photos" / "a.png")
    for kind in DRAWN:
        assert kind(16, seeded(0)).size == (16, 16)
    photographs = Photographs((str(tmp_path / "photos"), str(tiny_set)))
    assert len(photographs) == 37
    assert photographs.load(0).size == (20, 30)
    assert photographs.load(36).size == (16, 16)
    alone = Photographs((str(tmp_path / "photos"),))
    seen = [np.asarray(background(16, alone, seeded(number))) for number in range(20)]
    assert 3 < sum((pixels == (10, 200, 30)).all() for pixels in seen) < 17
