from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from improved_diffusion.models.transformer import Attention, SwiGLU, Transformer, rotary_positions, rotate

CPU = torch.device("cpu")
TINY = {"image_size": 16, "width": 32, "depth": 3, "num_heads": 2, "num_context_tokens": 2}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def test_parameter_count_is_that_of_the_formula():
    """Each block 18 width^2 and a little: 6 of modulation, 4 of attention, 8 of SwiGLU."""
    with torch.device("meta"):
        network = Transformer(image_size=64, num_classes=101)
        wide = Transformer(image_size=256, patch_size=16, width=768, num_heads=12, bottleneck=128, num_classes=1000)
    width, depth = 384, 12
    block = 18 * width**2 + 6 * width + 2 * 64  # two norms of 64 channels
    embeddings = 256 * width + width + width**2 + width + 101 * width + 32 * width + 48 * width + width
    output = 2 * width**2 + 2 * width + 48 * width + 48
    assert sum(p.numel() for p in network.parameters()) == depth * block + embeddings + output == 32_510_256
    assert sum(p.numel() for p in wide.parameters()) == pytest.approx(131e6, rel=0.01)  # JiT-B/16, as published


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 5),
    st.integers(2, 5),
    st.integers(0, 3),
    st.sampled_from([4, 8, 64]),
    st.integers(0, 2**32),
    st.data(),
)
def test_attention_logits_depend_on_relative_positions_only(height, width, num_context, channels, seed, data):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, channels, generator=generator)
    rotations = rotary_positions(height, width, channels, num_context, CPU)
    tokens = num_context + height * width
    q, k = (rotate(one.expand(1, 1, tokens, channels), rotations)[0, 0] for one in (query, key))
    torch.testing.assert_close(q.norm(dim=1), query.norm().expand(tokens))  # they only turn
    assert torch.equal(q[:num_context], query.expand(num_context, channels))
    logits = (q @ k.T)[num_context:, num_context:].reshape(height, width, height, width)
    # moved by (down, right), both of a pair attend to each other as before
    down, right = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    moved = logits[down:, right:, down:, right:]
    stayed = logits[: height - down, : width - right, : height - down, : width - right]
    torch.testing.assert_close(moved, stayed, atol=1e-4, rtol=1e-4)
    # and rows are not columns, nor left right
    assert not torch.allclose(logits[0, 0, 1, 0], logits[0, 0, 0, 1], atol=1e-6)
    assert not torch.allclose(logits[0, 0, 0, 1], logits[0, 1, 0, 0], atol=1e-6)


def test_rotations_tell_the_row_by_one_half_and_the_column_by_the_other():
    cos, sin = rotary_positions(3, 4, 8, 1, CPU)
    angles = torch.atan2(sin, cos)
    assert angles.shape == (13, 4)
    assert not angles[0].any()
    token = 1 + 2 * 4 + 3  # row 2, column 3
    torch.testing.assert_close(angles[token], torch.tensor([2.0, 0.2, 3.0, 0.3]))


def test_attention_is_that_of_the_definition():
    torch.manual_seed(0)
    attention, rotations = Attention(16, 2), rotary_positions(2, 3, 8, 1, CPU)
    x = normal(2, 7, 16)
    qkv = attention.qkv(x)
    parts = []
    for head in range(2):
        q, k, v = (qkv[..., 16 * i + 8 * head : 16 * i + 8 * (head + 1)] for i in range(3))
        q, k = (one / one.square().mean(-1, keepdim=True).sqrt() for one in (q, k))
        q, k = (rotate(one[:, None], rotations)[:, 0] for one in (q, k))
        parts.append(torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v)
    torch.testing.assert_close(attention(x, rotations), attention.out(torch.cat(parts, -1)), atol=1e-5, rtol=1e-4)


def test_attention_does_not_see_how_large_queries_and_keys_are():
    """What QK norm is for: logits stay bounded however the weights grow."""
    torch.manual_seed(0)
    attention, rotations, x = Attention(16, 2), rotary_positions(2, 3, 8, 0, CPU), normal(2, 6, 16)
    before = attention(x, rotations)
    with torch.no_grad():
        attention.qkv.weight[:32] *= 100
    torch.testing.assert_close(attention(x, rotations), before, atol=1e-4, rtol=1e-3)


def test_swiglu_is_the_gated_product():
    torch.manual_seed(0)
    mlp, x = SwiGLU(24), normal(5, 24)
    gate, value = mlp.gate_and_value.weight.chunk(2)
    expected = (nn.functional.silu(x @ gate.T) * (x @ value.T)) @ mlp.out.weight.T
    torch.testing.assert_close(mlp(x), expected)
    assert sum(p.numel() for p in mlp.parameters()) == 8 * 24**2


def test_the_class_reaches_attention_in_tokens_of_its_own():
    """Not by the adaptive norms alone: these are held at zero here."""
    torch.manual_seed(0)
    network = Transformer(**TINY, num_classes=2).eval()
    nn.init.normal_(network.output.weight)
    for block in network.blocks:
        nn.init.zeros_(block.modulation.weight)
        nn.init.ones_(block.modulation.bias)
    x_t, t = normal(1, 3, 16, 16), torch.tensor([500.0])

    def difference() -> float:
        one, other = (network(x_t, t, torch.tensor([y])) for y in (0, 1))
        return (one - other).abs().max().item()

    assert difference() > 1e-3
    network.context_start = len(network.blocks)  # they come too late
    assert difference() == 0


@pytest.mark.parametrize("num_context_tokens", [0, 3])
@pytest.mark.parametrize("depth", [1, 2, 6])
def test_context_tokens_join_after_a_third_of_the_blocks(num_context_tokens, depth):
    network = Transformer(**{**TINY, "depth": depth, "num_context_tokens": num_context_tokens})
    lengths = []
    for block in network.blocks:
        block.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    network(normal(2, 3, 16, 16), torch.zeros(2)).sum().backward()
    first = depth // 3
    assert lengths == [16] * first + [16 + num_context_tokens] * (depth - first)


def test_a_bottleneck_lets_few_channels_through():
    layers = Transformer(**TINY, bottleneck=5).patch_embedding
    assert [tuple(layer.weight.shape) for layer in layers] == [(5, 48), (32, 5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 36}, "width is 36; with 2 heads it must be divisible by 8"),
        ({"width": 0}, "width is 0"),
        ({"depth": 0}, "depth is 0"),
        ({"num_context_tokens": -1}, "num_context_tokens is -1"),
        ({"bottleneck": 0}, "bottleneck is 0"),
        ({"patch_size": 3}, "image_size is 16; with patch_size 3 it must be divisible by 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Transformer(**{**TINY, **change})
