"""Opening pipelines."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

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


def test_the_safety_checker_is_left_out(tiny_bases, tmp_path):
    """Nothing asks it, and in some versions of diffusers the pipeline takes its device for that of all."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**small, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=small, vision_config=vision, projection_dim=8)
    pipeline = load_base(str(tiny_bases["sd"])).pipeline
    pipeline.register_modules(safety_checker=StableDiffusionSafetyChecker(config))
    pipeline.save_pretrained(tmp_path / "checked")
    assert (tmp_path / "checked" / "safety_checker").is_dir()
    assert load_base(str(tmp_path / "checked")).pipeline.safety_checker is None


def test_the_fingerprint_is_that_of_the_weights(tiny_bases, tmp_path):
    base = load_base(str(tiny_bases["sd"]))
    base.pipeline.save_pretrained(tmp_path / "moved")
    assert load_base(str(tmp_path / "moved")).fingerprint() == base.fingerprint()
    with torch.no_grad():
        base.unet.conv_in.weight[0, 0, 0, 0] += 1
    assert load_base(str(tmp_path / "moved")).fingerprint() != base.fingerprint()


def test_weights_lie_where_results_do_not_depend_on_the_file(tiny_bases):
    """A product of matrices on a CPU may have other last digits where one lies at an odd address."""
    for name in ("sd", "sdxl"):
        for network in load_base(str(tiny_bases[name])).networks.values():
            assert all(weight.data_ptr() % 64 == 0 for weight in network.parameters())
