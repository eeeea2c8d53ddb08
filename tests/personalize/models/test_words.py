"""New words, and their files read back by diffusers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
from improved_diffusion.personalize.models.base import load_base  # noqa: E402
from improved_diffusion.personalize.models.encoding import encode_texts  # noqa: E402
from improved_diffusion.personalize.models.words import add_word, export_word, learned_rows  # noqa: E402

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
        assert rows.shape == (2, 32)
        table = base.text_encoders[name].get_input_embeddings()
        assert [parameter.requires_grad for parameter in table.parameters()] == [True, False]
    sum(states.square().sum() for states in encode_texts(base, [PROMPT]).values()).backward()
    assert all(rows.grad.abs().sum() > 0 for rows in learned_rows(base).values())


@pytest.mark.parametrize("vectors", [1, 2])
def test_the_file_read_by_diffusers_means_the_same(base, tmp_path, vectors):
    add_word(base, "<corgi>", "dog", vectors)
    with torch.no_grad():
        for rows in learned_rows(base).values():
            rows += torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    expected = encode(base, PROMPT)
    state = load_file(export_word(base, "<corgi>", tmp_path))
    fresh = load_base(base.name)
    if base.is_sdxl:
        pipeline = fresh.pipeline
        pipeline.load_textual_inversion(
            state["clip_l"], token="<corgi>", text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer
        )
        pipeline.load_textual_inversion(
            state["clip_g"], token="<corgi>", text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2
        )
    else:
        fresh.pipeline.load_textual_inversion(str(tmp_path), weight_name="learned_embeds.safetensors")
    for name, states in expected.items():
        torch.testing.assert_close(encode(fresh, PROMPT)[name], states)
