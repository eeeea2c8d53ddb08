"""Opening pipelines."""

from __future__ import annotations

import json
import shutil

import pytest

from improved_diffusion.errors import UserError

pytest.importorskip("diffusers")
from improved_diffusion.personalize.models.base import load_base, load_tokenizer  # noqa: E402


def test_what_is_no_base_is_one_line(tmp_path, tiny_bases):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model_index.json").write_text("{")
    other = tmp_path / "other"
    other.mkdir()
    index = json.loads((tiny_bases["sd"] / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "unet": ["diffusers", "UNet2DConditionModel"]}))
    cases = [
        (str(tmp_path / "missing"), "does not exist"),
        (str(tmp_path / "empty"), "no model_index.json"),
        (str(tmp_path / "damaged"), "cannot be read"),
        (str(other), "cannot be read"),
        ("stable", "does not exist"),
    ]
    for name, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            load_base(name)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_vocabulary_is_not_passed_over(tmp_path, tiny_bases, lose_vocabulary):
    shutil.copytree(tiny_bases["sdxl"], tmp_path, dirs_exist_ok=True)
    for name, load in (("tokenizer_2", load_base), ("tokenizer", load_tokenizer)):
        lose_vocabulary(tmp_path / name)
        with pytest.raises(UserError, match="cannot be read"):
            load(str(tmp_path))


def test_a_hub_that_cannot_be_reached_says_what_to_download(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for load in (load_base, load_tokenizer):
        with pytest.raises(UserError, match=r"hf download nobody/nothing-here --local-dir DIR.*--base DIR"):
            load("nobody/nothing-here")
