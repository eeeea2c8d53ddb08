"""Group normalisation against its definition, in float64, with gradients by autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from improved_diffusion.diffusion.noise import seeded_generator
from improved_diffusion.models.group_norm import SOURCE, GroupNorm
from improved_diffusion.runtime.c_library import compiled


def definition(x, weight, bias, scale, shift, groups, eps):
    """Normalise over the channels of a group and all positions, then scale and shift."""
    n, c, h, w = x.shape
    grouped = x.reshape(n, groups, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    normalised = centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()
    y = normalised.reshape(n, c, h, w) * weight[:, None, None] + bias[:, None, None]
    return y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3),
    channels=st.sampled_from([4, 32, 48, 96]),
    size=st.sampled_from([4, 32, 33]),
    adaptive=st.booleans(),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32),
)
def test_values_and_gradients_are_those_of_the_definition(n, channels, size, adaptive, channels_last, dtype, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    norm = GroupNorm(channels)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * normal(channels))
        norm.bias.copy_(normal(channels))
    x = (normal(n, channels, size, size) * 3 + normal(n, channels, 1, 1)).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    scale, shift = normal(n, channels) * 0.5, normal(n, channels)
    scale, shift = (scale, shift) if adaptive else (scale * 0, shift * 0)
    grad = normal(n, channels, size, size).to(dtype)

    exact = [v.detach().double().requires_grad_() for v in (x, norm.weight, norm.bias, scale, shift)]
    expected = definition(*exact, norm.num_groups, norm.eps)
    expected.backward(grad.double())

    own = [v.requires_grad_() for v in (x, norm.weight, norm.bias, scale, shift)]
    with torch.autocast("cpu", torch.bfloat16):  # which must not change what is computed
        y = norm(x, scale, shift) if adaptive else norm(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    y.backward(grad.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format))

    bound = 1e-4 if dtype == torch.float32 else 0.015
    assert relative_error(y, expected.detach()) < bound
    assert relative_error(x.grad, exact[0].grad) < bound
    for tensor, reference in list(zip(own, exact, strict=True))[1 : 5 if adaptive else 3]:
        # sums over positions of terms of either sign may cancel: `grad.norm()` is the size that they have by chance
        assert (tensor.grad - reference.grad).norm() < bound * max(reference.grad.norm(), grad.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_mean_does_not_swamp_the_variance(dtype):
    x = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0)) + 16
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    y = GroupNorm(32)(x).detach()
    zero = torch.zeros(2, 32)
    expected = definition(x.double(), torch.ones(32), torch.zeros(32), zero, zero, 32, 1e-5)
    assert relative_error(y, expected) < (1e-4 if dtype == torch.float32 else 0.01)


@pytest.fixture
def forgotten():
    """What is compiled is looked for again, before and after."""
    compiled.cache_clear()
    yield
    compiled.cache_clear()


def results(x, grad, silu):
    norm = GroupNorm(x.shape[1])
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    scale, shift = (torch.randn(len(x), x.shape[1], generator=seeded_generator(i)).requires_grad_() for i in (1, 2))
    y = norm(x, scale, shift, silu=silu)
    y.backward(grad)
    return [y.detach(), *(v.grad for v in (x, norm.weight, norm.bias, scale, shift))]


def test_one_pass_of_c_gives_what_pytorch_gives(forgotten, monkeypatch, tmp_path):
    """Compiled anew, into an empty cache."""
    monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path))
    assert compiled(SOURCE) is not None, "there is no C compiler"
    x, grad = (torch.randn(3, 48, 20, 12, generator=seeded_generator(i)) * 3 + 1 for i in (3, 4))
    for dtype, bound, libraries in ((torch.float32, 2e-6, 1), (torch.bfloat16, 0.01, 2)):
        given = [v.to(dtype).contiguous(memory_format=torch.channels_last) for v in (x, grad)]
        for silu in (False, True):
            own = results(*given, silu)
            assert len(list((tmp_path / "c").iterdir())) == libraries
            with monkeypatch.context() as patch:
                patch.setenv("IMPROVED_DIFFUSION_C", "0")
                compiled.cache_clear()
                by_pytorch = results(*given, silu)
            compiled.cache_clear()
            for value, expected in zip(own, by_pytorch, strict=True):
                assert value.dtype == expected.dtype
                assert relative_error(value, expected.double()) < bound


def test_silu_far_from_zero_and_what_is_not_finite():
    x = torch.tensor([-200.0, -90, -20, -1e-3, 0, 20, 90, 200]).reshape(1, 8, 1, 1).repeat(1, 1, 2, 2)
    x = x.contiguous(memory_format=torch.channels_last)
    norm, zero = GroupNorm(8), torch.zeros(1, 8)
    y = norm(x, zero - 1, x[:, :, 0, 0].contiguous(), silu=True)  # of the shift alone
    assert torch.allclose(y, torch.nn.functional.silu(x), rtol=1e-6, atol=1e-35)
    x[0, 0, 0, 0] = torch.nan
    assert norm(x, silu=True)[0, 0].isnan().all()


def test_without_a_compiler_there_is_one_warning_and_the_same_values(forgotten, monkeypatch):
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    expected = GroupNorm(32)(x, silu=True)
    compiled.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.warns(UserWarning, match="group_norm.c cannot be compiled here.*no-such-compiler") as warned:
        values = [GroupNorm(32)(x, silu=True) for _ in range(2)]
    assert len(warned) == 1
    assert relative_error(values[1].detach(), expected.detach().double()) < 1e-6
