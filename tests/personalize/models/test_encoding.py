"""Texts and images against what the pipelines themselves make of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
from improved_diffusion.personalize.models.encoding import decode_latents, encode_texts, latent_moments  # noqa: E402


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


def test_the_moments_are_the_autoencoders_on_the_unets_scale(base):
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = latent_moments(base, pixels)
    vae = base.pipeline.vae
    with torch.no_grad():
        distribution = vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, distribution.mean * vae.config.scaling_factor)
    torch.testing.assert_close(std, distribution.std * vae.config.scaling_factor)


def test_latents_are_decoded_as_the_pipeline_does(base):
    settings = {"num_inference_steps": 2, "height": 64, "width": 64}
    outputs = [
        base.pipeline("a dog", **settings, output_type=kind, generator=torch.Generator().manual_seed(0)).images
        for kind in ("pil", "latent")
    ]
    (decoded,) = decode_latents(base, outputs[1])
    assert np.array_equal(np.asarray(decoded), np.asarray(outputs[0][0]))
