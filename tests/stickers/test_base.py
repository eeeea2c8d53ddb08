"""What the embedded base is made of: icons and their names, a vocabulary of CLIP's that is cut down."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.data.captioned import open_captioned_set
from tests.personalize.conftest import scripts, tiny_bases  # noqa: F401

NAMES = ("birthday cake", "waving hand", "waving hand: dark skin tone", "red heart", "guitar", "cat face", "thing 3")


@pytest.fixture
def icons(tmp_path) -> Path:
    """A zip as `data icons` writes it."""
    path, rows = tmp_path / "noto.zip", []
    picture = io.BytesIO()
    Image.new("RGBA", (16, 16), "red").save(picture, "png")
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(NAMES):
            file = f"objects/{number}.png"
            archive.writestr(file, picture.getvalue())
            row = {"file_name": file, "text": f"noto sticker of {name}", "name": name, "style": "noto"}
            rows.append({**row, "base": name.split(":")[0]})
        archive.writestr("metadata.jsonl", "\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.usefixtures("scripts")
def test_icons_become_images_of_several_wordings(icons, tmp_path):
    import sticker_base

    texts = sticker_base.write_splits([icons], tmp_path / "out")
    found = {split: open_captioned_set(tmp_path / "out" / split).images for split in ("train", "held-out")}
    names = {split: {image.caption.removeprefix("noto sticker of ") for image in of} for split, of in found.items()}
    assert names["train"] | names["held-out"] == set(NAMES) - {"waving hand: dark skin tone"}
    assert names["held-out"] == {name for name in NAMES if sticker_base.is_held_out(name)} - {NAMES[2]}
    image = found["train"][0]
    name = image.caption.removeprefix("noto sticker of ")
    assert {image.caption, *image.other_captions} == {f"noto sticker of {name}", name, f"sticker of {name}"}
    assert set(texts) == {text for of in found.values() for i in of for text in (i.caption, *i.other_captions)}
    with pytest.raises(UserError, match="is no zip of"):
        sticker_base.write_splits([tmp_path / "nothing.zip"], tmp_path / "again")


@pytest.fixture
def run(scripts, monkeypatch):  # noqa: F811
    """`python scripts/sticker_base.py ARGUMENTS` in this process."""
    import sticker_base

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["sticker_base.py", *map(str, arguments)])
        sticker_base.main()

    return run


def test_pictures_are_drawn_of_the_names_that_were_held_out(run, icons, tiny_bases, tmp_path, capsys):  # noqa: F811
    run("draw", icons, "--base", tiny_bases["sd"], "--steps=1", "--out", tmp_path / "out")
    held_out = sorted(path.name for path in (tmp_path / "out" / "real" / "held-out" / "objects").iterdir())
    train = sorted(path.name for path in (tmp_path / "out" / "real" / "train" / "objects").iterdir())
    assert sorted(held_out + train) == [f"noto-{number}.png" for number in range(len(NAMES)) if number != 2]
    drawn = list((tmp_path / "out" / "drawn" / "objects").iterdir())
    assert sorted(path.name for path in drawn) == held_out
    assert all(Image.open(path).size == (128, 128) for path in drawn)
    assert f"{len(held_out)} pictures in" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists already"):
        run("draw", icons, "--base", tiny_bases["sd"], "--out", tmp_path / "out")


def test_a_style_is_a_few_icons_spread_over_a_set(run, icons, tmp_path):
    run("style", icons, "--n=2", "--out", tmp_path / "style")
    captions = [image.caption for image in open_captioned_set(tmp_path / "style").images]
    assert len(captions) == 2
    assert captions[0] == "noto sticker of birthday cake"
    with pytest.raises(UserError, match="--n must be at least 1, not 0"):
        run("style", icons, "--n=0", "--out", tmp_path / "none")


@pytest.mark.usefixtures("scripts")
def test_what_is_kept_of_the_vocabulary_splits_captions_as_the_whole_does(monkeypatch):
    import sticker_base
    from tiny_pipeline import make_tokenizer

    monkeypatch.setattr(sticker_base, "COMMON_MERGES", 50)
    texts = ["red heart", "sticker of a dog"]
    vocabulary, merges = sticker_base.reduced_vocabulary(texts)
    whole, few = make_tokenizer("<|endoftext|>"), make_tokenizer("<|endoftext|>", (vocabulary, merges), 32)
    assert len(few) == len(vocabulary) < len(whole)
    for text in (*texts, "sks"):
        assert few.tokenize(text) == whole.tokenize(text), text
    assert few.decode(few("guitar").input_ids, skip_special_tokens=True).strip() == "guitar"  # in smaller pieces
    assert few("red heart", padding="max_length").input_ids[-1] == few.pad_token_id
