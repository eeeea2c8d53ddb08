"""Captions by a tiny random BLIP, through the command line; the same model, called by hand, is the answer key."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("transformers")
from improved_diffusion.errors import UserError  # noqa: E402
from improved_diffusion.personalize.data.captioned import open_captioned_set  # noqa: E402
from improved_diffusion.personalize.data.captioning import BEAM_SEARCH, find_uncaptioned, write_captions  # noqa: E402
from improved_diffusion.personalize.models.judges import BLIP, load_blip  # noqa: E402


def noise(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Three images without a caption (one lies on its side, one is transparent), one with, and two of no use."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    noise(0).save(tmp_path / "phone.png", exif=exif)
    sticker = noise(1)
    sticker.putalpha(Image.new("L", sticker.size, 0))
    sticker.save(tmp_path / "sticker.png")
    (tmp_path / "deep").mkdir()
    noise(2).save(tmp_path / "deep" / "plain.png")
    noise(3).save(tmp_path / "known.jpg")
    (tmp_path / "known.txt").write_text("a caption of mine")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "known.jpg").read_bytes()[:200])
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.4")
    return tmp_path


@pytest.fixture
def caption(run_script, tiny_judges):
    """The command, with the tiny model."""
    return lambda *arguments: run_script("personalize.py", "caption", "--model", tiny_judges["blip"], *arguments)


def test_images_without_a_caption_get_one(caption, folder, tiny_judges):
    outcome = caption(folder)
    assert outcome.code == 0, outcome.err
    model, processor = load_blip(str(tiny_judges["blip"]))
    expected = {}
    for name, image in {
        "deep/plain.png": noise(2),
        "phone.png": noise(0).rotate(-90, expand=True),
        "sticker.png": Image.new("RGB", (40, 30), "white"),
    }.items():
        tokens = model.generate(**processor(images=image, return_tensors="pt"), **BEAM_SEARCH)
        expected[name] = processor.decode(tokens[0], skip_special_tokens=True)
    assert len(set(expected.values())) == 3  # it sees them apart
    found = {image.name: image.caption for image in open_captioned_set(folder).images}
    assert found == {**expected, "known.jpg": "a caption of mine"}
    *lines, last = outcome.out.splitlines()
    assert [f"{name}: {text}" for name, text in expected.items()] == [line for line in lines if line[:7] != "skipped"]
    assert {line.split(":")[0] for line in lines if line[:7] == "skipped"} == {
        "skipped broken.jpg",
        "skipped paper.pdf",
    }
    assert last == "3 captions written, 1 kept, 2 files skipped"
    assert caption(folder).out.splitlines()[-1] == "0 captions written, 4 kept, 2 files skipped"


def test_overwriting_with_a_prefix_whatever_the_batch(caption, folder):
    texts = []
    for batch_size in (1, 3):
        outcome = caption(folder, "--overwrite", "--prefix", "a photo of", "--batch-size", batch_size)
        assert outcome.out.splitlines()[-1] == "4 captions written, 0 kept, 2 files skipped", outcome.err
        texts.append([image.caption for image in open_captioned_set(folder).images])
    assert texts[0] == texts[1]
    assert all(text.startswith("a photo of") for text in texts[0])


def test_what_an_interruption_leaves_is_gone_on_from(folder, tiny_judges):
    _, uncaptioned = find_uncaptioned(folder)
    captions = write_captions(folder, uncaptioned, *load_blip(str(tiny_judges["blip"])), batch_size=1)
    first, text = next(captions)
    captions.close()
    assert (folder / first).with_suffix(".txt").read_text() == f"{text}\n"
    assert [image.name for image in find_uncaptioned(folder)[1]] == [image.name for image in uncaptioned[1:]]


def test_metadata_is_kept_and_added_to(caption, folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "phone.png", "text": "from the metadata"}\n')
    assert caption(folder).out.splitlines()[-1] == "2 captions written, 2 kept, 2 files skipped"
    assert not open_captioned_set(folder).without_caption()
    outcome = caption(folder, "--overwrite")
    assert outcome.is_one_clear_line()
    assert "metadata.jsonl" in outcome.err


def test_two_images_cannot_share_a_text_file(folder):
    shutil.copy(folder / "phone.png", folder / "sticker.jpg")
    with pytest.raises(UserError, match=r"sticker\.jpg and sticker\.png would share"):
        find_uncaptioned(folder)


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_parquet_file_cannot_be_written_to(caption, tmp_path, as_folder):
    (tmp_path / "train.parquet").touch()
    outcome = caption(tmp_path if as_folder else tmp_path / "train.parquet")
    assert outcome.is_one_clear_line()
    assert "not into a parquet file" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-size", 0), "--batch-size must be at least 1"),
        (("--device", "abacus"), "--device abacus cannot be used here"),
        (("--model", "missing"), "the BLIP model missing does not exist"),
    ],
)
def test_mistakes_are_one_line(caption, folder, arguments, message):
    outcome = caption(folder, *arguments)
    assert outcome.is_one_clear_line()
    assert message in outcome.err


def test_the_help_names_the_model(caption):
    outcome = caption("--help")
    assert outcome.code == 0
    assert BLIP in outcome.out.replace("\n", "")
