"""Opening pipelines; texts and images against what the pipelines themselves make of them."""

from __future__ import annotations

import json

import pytest
import torch

from improved_diffusion.errors import UserError

pytest.importorskip("diffusers")
from improved_diffusion.personalize.models.base import encode_images, encode_texts, load_base, load_tokenizer  # noqa: E402


def test_texts_are_encoded_as_the_pipeline_does(base):
    texts = ["a photo of a dog", "an oil painting, blue"]
    with torch.no_grad():
        found = encode_texts(base, texts)
        expected = base.pipeline.encode_prompt(
            texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    torch.testing.assert_close(found["states"], expected[0])
    assert ("pooled" in found) == base.is_sdxl
    if base.is_sdxl:
        torch.testing.assert_close(found["pooled"], expected[2])


def test_images_are_encoded_scaled_and_drawn_by_the_seed(base):
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        mean = encode_images(base, pixels)
        distribution = base.pipeline.vae.encode(pixels).latent_dist
        torch.testing.assert_close(mean, distribution.mean * base.pipeline.vae.config.scaling_factor)
        one, two, other = (encode_images(base, pixels, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    deviation = (distribution.std * base.pipeline.vae.config.scaling_factor).mean()
    assert (one - mean).abs().mean() == pytest.approx(0.8 * deviation.item(), rel=0.1)


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


def test_a_hub_that_cannot_be_reached_says_what_to_download(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for load in (load_base, load_tokenizer):
        with pytest.raises(UserError, match=r"hf download nobody/nothing-here --local-dir DIR.*--base DIR"):
            load("nobody/nothing-here")
