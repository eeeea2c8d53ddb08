"""Texts and images against what the pipelines themselves make of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from improved_diffusion.errors import UserError

pytest.importorskip("diffusers")
from improved_diffusion.personalize.config import TextConfig  # noqa: E402
from improved_diffusion.personalize.models.encoding import (  # noqa: E402
    decode_latents,
    encode_prompts,
    encode_texts,
    latent_moments,
    tokens_in_chunks,
)

WORDS = ("a", "dog", "red", "on", "the", "and")  # each a token


def encoded_by_pipeline(base, text: str, **settings) -> dict[str, torch.Tensor]:
    how = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        found = base.pipeline.encode_prompt([text], **how, **settings)
    return {"states": found[0], **({"pooled": found[2]} if base.is_sdxl else {})}


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


@pytest.mark.parametrize("skip", [1, 2])
def test_skipped_layers_are_those_of_diffusers_and_of_the_encoders_by_hand(base, skip):
    read = replace(base, text=TextConfig(clip_skip=skip))
    with torch.no_grad():
        found = encode_texts(read, ["a photo of a dog"])
    torch.testing.assert_close(found, encoded_by_pipeline(base, "a photo of a dog", clip_skip=skip - 1), rtol=0, atol=0)
    by_hand, made = [], []
    for tokenizer, encoder in zip(base.tokenizers, base.text_encoders.values(), strict=True):
        layer = encoder.text_model.encoder.layers[-1 - skip if base.is_sdxl else -skip]
        hook = layer.register_forward_hook(lambda layer, given, states: made.append(states))
        with torch.no_grad():
            encoder(tokenizer("a photo of a dog", padding="max_length", max_length=77, return_tensors="pt").input_ids)
            states = made[-1][0] if isinstance(made[-1], tuple) else made[-1]
            by_hand.append(states if base.is_sdxl else encoder.text_model.final_layer_norm(states))
        hook.remove()
    torch.testing.assert_close(found["states"], torch.cat(by_hand, dim=-1))


def test_more_layers_than_there_are(base):
    with pytest.raises(UserError, match=f"the clip skip 4 is too large for .*: at most {2 if base.is_sdxl else 3}"):
        replace(base, text=TextConfig(clip_skip=4))
    with pytest.raises(UserError, match="text.clip_skip must be at least 1"):
        TextConfig(clip_skip=0)


@pytest.mark.parametrize("length", [150, 225])
def test_a_long_text_is_read_75_tokens_at_a_time(base, length):
    words = [WORDS[number**2 % len(WORDS)] for number in range(260)]
    pieces = [" ".join(words[first : first + 75]) for first in range(0, length, 75)]
    for long, chunks in ((" ".join(words), pieces), (" ".join(words[:80]), [pieces[0], " ".join(words[75:80]), ""])):
        with torch.no_grad():
            found = encode_texts(replace(base, text=TextConfig(max_token_length=length)), ["a dog", long])
        each = [encoded_by_pipeline(base, piece) for piece in chunks[: length // 75]]
        expected = [each[0]["states"][:, :1], *(of["states"][:, 1:-1] for of in each), each[-1]["states"][:, -1:]]
        torch.testing.assert_close(found["states"][1:], torch.cat(expected, dim=1))
        assert found["states"].shape[1] == length + 2
        if base.is_sdxl:
            torch.testing.assert_close(found["pooled"][1:], each[0]["pooled"])


def test_the_negative_prompt_is_read_as_the_prompt(base):
    how = TextConfig(clip_skip=2, max_token_length=150)
    found = encode_prompts(replace(base, text=how), ["a dog", "red"], "a cat", guided=True)
    with torch.no_grad():
        expected = encode_texts(replace(base, text=how), ["a cat"])["states"]
    torch.testing.assert_close(found["negative_prompt_embeds"], expected.expand(2, -1, -1))
    none = encode_prompts(replace(base, text=how), ["a dog"], "", guided=True)
    assert none["negative_prompt_embeds"].shape == none["prompt_embeds"].shape
    assert none["prompt_embeds"].shape[1] == 152


def test_one_chunk_is_what_the_tokenizer_makes(fresh_base):
    tokenizers = fresh_base("sdxl").tokenizers

    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.sampled_from([*WORDS, "!", "sks", "ball,", "ünï", "<|endoftext|>"]), max_size=90))
    def same(words):
        for tokenizer in tokenizers:
            how = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
            whole = tokenizer([" ".join(words)], **how).input_ids
            assert torch.equal(tokens_in_chunks(tokenizer, [" ".join(words)], 1)[0], whole)

    same()


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
