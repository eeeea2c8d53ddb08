"""New words, and their files read back by diffusers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
from diffusers import StableDiffusionXLPipeline  # noqa: E402

from improved_diffusion.personalize.models.base import Base, load_base  # noqa: E402
from improved_diffusion.personalize.models.encoding import encode_texts  # noqa: E402
from improved_diffusion.personalize.models.words import (  # noqa: E402
    add_word,
    advice_to_readers,
    export_word,
    learned_rows,
)

PROMPT = "a photo of <corgi> in the forest"


@torch.no_grad()
def encode(base, text: str) -> dict[str, torch.Tensor]:
    return encode_texts(base, [text])


@pytest.mark.parametrize("vectors", [1, 3])
def test_a_new_word_starts_as_the_word_that_it_is_like(base, vectors):
    before = encode(base, f"a photo of {' '.join(['dog'] * vectors)} in the forest")
    other = encode(base, "an oil painting")
    add_word(base, "<corgi>", "dog", vectors)
    after = encode(base, PROMPT)
    for name, states in before.items():
        torch.testing.assert_close(after[name], states)
        assert torch.equal(encode(base, "an oil painting")[name], other[name])


def test_its_embeddings_alone_learn(base):
    add_word(base, "<corgi>", "dog", 2)
    for name, rows in learned_rows(base).items():
        table = base.text_encoders[name].get_input_embeddings()
        assert rows.shape == (2, table.weight.shape[1])
        assert [parameter.requires_grad for parameter in table.parameters()] == [True, False]
    sum(states.square().sum() for states in encode_texts(base, [PROMPT]).values()).backward()
    assert all(rows.grad.abs().sum() > 0 for rows in learned_rows(base).values())


def learn(base, vectors: int) -> dict[str, torch.Tensor]:
    """Add a word with embeddings drawn at random; returns what the UNet is told of a text that has it."""
    add_word(base, "<corgi>", "dog", vectors)
    with torch.no_grad():
        for rows in learned_rows(base).values():
            rows += torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    return encode(base, PROMPT)


def read_with_diffusers(pipeline, file) -> None:
    """As its documentation says."""
    if not hasattr(pipeline, "text_encoder_2"):
        pipeline.load_textual_inversion(str(file.parent), weight_name=file.name)
        return
    state = load_file(file)
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
        parts = {name: getattr(pipeline, f"{name}{suffix}") for name in ("text_encoder", "tokenizer")}
        pipeline.load_textual_inversion(state[key], token="<corgi>", **parts)


@pytest.mark.parametrize("vectors", [1, 2])
def test_the_file_read_by_diffusers_means_the_same(base, tmp_path, vectors):
    expected = learn(base, vectors)
    file = export_word(base, "<corgi>", tmp_path)
    fresh = load_base(base.name)
    read_with_diffusers(fresh.pipeline, file)
    for name, states in expected.items():
        torch.testing.assert_close(encode(fresh, PROMPT)[name], states)


def test_readers_of_sdxl_are_told_of_the_end_token(tiny_bases, tmp_path):
    """Its configs, as published, give the end of a text a wrong number."""
    base = load_base(str(tiny_bases["sdxl"]))
    expected = learn(base, 1)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_bases["sdxl"])  # as any other program opens it
    read_with_diffusers(pipeline, export_word(base, "<corgi>", tmp_path))
    as_it_comes = encode(Base("plain", pipeline), PROMPT)["pooled"]
    assert not torch.allclose(as_it_comes, expected["pooled"], atol=1e-3)
    exec(advice_to_readers(base).partition("there, set ")[2], {"pipeline": pipeline})
    torch.testing.assert_close(encode(Base("plain", pipeline), PROMPT), expected)
    assert advice_to_readers(load_base(str(tiny_bases["sd"]))) is None  # which does not look at the end
