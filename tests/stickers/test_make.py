"""From photographs to stickers by the command line, with tiny random models."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import SubjectConfig
from improved_diffusion.results import claim_for
from improved_diffusion.stickers.finish import require_sticker
from improved_diffusion.stickers.prompt import TEMPLATE, TUNED, default_template, fill

DREAMBOOTH = SubjectConfig(token="sks", class_name="sticker")


class TestPrompt:
    def test_a_caption_is_text_and_no_template(self):
        assert fill(TUNED, "a {dog} on a {class}", DREAMBOOTH) == "a sks sticker of a {dog} on a {class}"
        assert fill("a hat", None, SubjectConfig()) == "a hat"

    @pytest.mark.parametrize(
        ("template", "problem"), [(TEMPLATE, "has no caption"), (TUNED, "no caption"), ("{dog}", "{dog}")]
    )
    def test_what_is_missing_is_named(self, template, problem):
        with pytest.raises(UserError, match=problem):
            fill(template, None, DREAMBOOTH)

    def test_a_runs_subject_is_in_the_prompt(self):
        assert (default_template(DREAMBOOTH), default_template(SubjectConfig())) == (TUNED, TEMPLATE)


@pytest.fixture
def command(tiny_base, tiny_judges, cutout, keep_colours, photograph, tmp_path):
    photos = [photograph("a.png"), photograph("b.jpg", (64, 96))]
    flags = (f"--base={tiny_base}", f"--blip={tiny_judges['blip']}", f"--matting={cutout}", "--steps=2")
    return ("make", *photos, *flags, "--outline=6", f"--out={tmp_path / 'out'}")


def test_a_picture_is_cut_out_on_the_device_that_was_asked_for(run_script, cutout, photograph, tmp_path):
    where = (f"--matting={cutout}", "--device=cuda:99", f"--out={tmp_path / 'out'}")
    outcome = run_script("stickers.py", "cut", photograph("a.png"), *where)
    assert outcome.is_one_clear_line()
    assert "cuda:99 cannot be used here" in outcome.err


def test_all_stages_and_once_more_after_a_kill(command, run_script, photograph, tmp_path):
    out = tmp_path / "out"
    broken = photograph("broken.png")
    broken.write_text("no picture")
    outcome = run_script("stickers.py", "make", broken, *command[1:])
    assert (outcome.code, "broken.png: this is no picture" in outcome.err) == (2, True), outcome.err
    stickers = sorted((out / "stickers").glob("*.webp"))
    assert [file.name for file in stickers] == ["a.webp", "b.webp"]
    for file in stickers:
        require_sticker(file)
    assert Image.open(out / "sheet.png").width > 7 * 192
    drawn = {file: file.stat().st_mtime_ns for file in (out / "restyled").iterdir()}
    stickers[0].unlink()
    whole = stickers[1].read_bytes()
    (out / "cut" / "b.png").unlink()
    outcome = run_script("stickers.py", *command)
    assert outcome.code == 0, outcome.err
    assert {file: file.stat().st_mtime_ns for file in (out / "restyled").iterdir()} == drawn
    assert (stickers[0].is_file(), stickers[1].read_bytes()) == (True, whole)


def test_a_prompt_that_needs_no_caption_asks_for_none(command, run_script, tmp_path):
    outcome = run_script("stickers.py", *command, "--prompt=a red heart", "--blip=nowhere")
    assert outcome.code == 0, outcome.err
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["cut", "restyled", "sheet.png", "stickers"]
    assert json.loads((out / "restyled/manifest.json").read_text())["prompt"] == "a red heart"


def test_results_of_other_settings_or_pictures_are_not_mixed(
    cutout, keep_colours, run_script, photograph, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command = ("cut", photograph("a.png"), f"--matting={cutout}", "--out=out")
    assert run_script("stickers.py", *command).code == 0
    outcome = run_script("stickers.py", *command, "--matting=alpha")
    assert outcome.is_one_clear_line()
    assert "drawn with matting" in outcome.err
    assert "not 'alpha': choose another --out" in outcome.err
    assert run_script("stickers.py", "cut", photograph("b.png"), *command[2:]).code == 0, "others may join"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(photograph("a.png"))
    outcome = run_script("stickers.py", *command)
    assert outcome.is_one_clear_line()
    assert "a.png was made of something else: choose another --out" in outcome.err


def test_a_mistake_before_the_first_picture_is_mended_by_other_flags(tmp_path):
    description = tmp_path / "out" / "manifest.json"
    claim_for(description, {"prompt": "a dgo"}, {"a.png": "1"}, "choose another --out")
    claim_for(description, {"prompt": "a dog"}, {"a.png": "1"}, "choose another --out")
    (tmp_path / "out" / "a.png").touch()
    with pytest.raises(UserError, match="drawn with prompt 'a dog', not 'a cat': choose another --out"):
        claim_for(description, {"prompt": "a cat"}, {"a.png": "1"}, "choose another --out")


def test_each_stage_alone_gives_what_all_together_give(command, run_script, tmp_path):
    assert run_script("stickers.py", *command).code == 0
    _, first, second, base, blip, matting, steps, outline, _ = command
    a, b = tmp_path / "alone", tmp_path / "out"
    for stage in (
        ("caption", first, second, blip, f"--out={a / 'captions'}"),
        ("restyle", first, second, base, steps, f"--captions={a / 'captions'}", f"--out={a / 'restyled'}"),
        ("cut", *sorted((b / "restyled").glob("*.png")), matting, f"--out={a / 'cut'}"),
        ("finish", *sorted((b / "cut").glob("*.png")), outline, f"--out={a / 'stickers'}"),
    ):
        outcome = run_script("stickers.py", *stage)
        assert outcome.code == 0, outcome.err
    for file in b.rglob("*.*"):
        if file.name not in ("sheet.png", "manifest.json"):
            assert file.read_bytes() == (a / file.relative_to(b)).read_bytes(), file
    assert json.loads((a / "restyled/manifest.json").read_text())["prompt"] == TEMPLATE


@pytest.mark.parametrize(
    ("photos", "flags", "problem"),
    [
        (["."], (), "is a folder: give the pictures in it"),
        (["missing.jpg"], (), "there is no picture at missing.jpg"),
        (["x/a.png", "y/a.jpg"], (), "would have one name"),
        (["x/a.png"], ("--matting=missing",), "there is no cut-out at missing"),
        (["x/a.png"], ("--out=full",), "full is not empty: choose another --out"),
        (["x/a.png"], ("--out=x/a.png/y",), "could not write"),
    ],
)
def test_mistakes_are_answered_in_a_line(photos, flags, problem, cutout, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("x/a.png", "y/a.jpg", "full/a.png"):
        (tmp_path / file).parent.mkdir()
        Image.new("RGB", (32, 32)).save(file)
    outcome = run_script("stickers.py", "cut", *photos, f"--matting={cutout}", "--out=out", *flags)
    assert outcome.is_one_clear_line(), outcome.err
    assert problem in outcome.err


def test_a_run_that_is_none_is_named(command, run_script, tmp_path):
    arguments = [argument for argument in command if not str(argument).startswith("--base")]
    outcome = run_script("stickers.py", "restyle", *arguments[1:3], f"--run={tmp_path}", "--out=x", "--prompt=a dog")
    assert outcome.is_one_clear_line()
    assert "is not a run directory" in outcome.err
