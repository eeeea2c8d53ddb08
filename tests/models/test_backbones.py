"""What every network promises to the diffusion, whatever its kind."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from improved_diffusion.models.backbone import AUGMENTATION_PARAMETERS, Backbone, sinusoidal_embedding
from improved_diffusion.models.build import BACKBONES

TINY = {
    "unet": {"num_channels": 16, "channel_multipliers": (1, 2), "num_res_blocks": 1, "num_heads": 2}
    | {"attention_resolutions": ()},
    "transformer": {"width": 32, "depth": 3, "num_heads": 2, "num_context_tokens": 2},
}
KINDS = pytest.mark.parametrize("kind", list(BACKBONES))


def tiny(kind: str, **changes) -> Backbone:
    return BACKBONES[kind](**{"image_size": 16, **TINY[kind], **changes})


def randomised(kind: str, **changes) -> Backbone:
    """A tiny network, in evaluation mode, whose zero-initialised layers are drawn too, so that every path counts."""
    torch.manual_seed(0)
    network = tiny(kind, **changes).eval()
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
    return network


def inputs(n: int = 3, channels: int = 3, height: int = 16, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, channels, height, width, generator=generator), torch.arange(n) * 300


def gradients(network: Backbone, x_t: torch.Tensor, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        output = network(x_t, t)
    network.zero_grad()
    output.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value - exact).norm() / exact.norm()).item()


def test_sinusoidal_embedding_is_cosines_then_sines_of_geometric_frequencies():
    t = torch.tensor([0.0, 0.5, 999.0], dtype=torch.float64)
    frequencies = [10_000 ** (-i / 4) for i in range(4)]
    expected = [[f(time * w) for f in (math.cos, math.sin) for w in frequencies] for time in t.tolist()]
    torch.testing.assert_close(sinusoidal_embedding(t, 8), torch.tensor(expected), atol=1e-4, rtol=0)
    integers = torch.tensor([0, 7, 999])
    assert torch.equal(sinusoidal_embedding(integers, 8), sinusoidal_embedding(integers.float(), 8))


@KINDS
@settings(max_examples=15, deadline=None)
@given(
    height=st.sampled_from([16, 24, 32]),
    width=st.sampled_from([16, 24, 32]),
    channels=st.sampled_from([1, 3, 4]),
    patch_size=st.sampled_from([1, 2, 4]),
    learned_variance=st.booleans(),
    n=st.integers(1, 3),
)
def test_images_of_any_shape_come_back_in_theirs(kind, height, width, channels, patch_size, learned_variance, n):
    out_channels = 2 * channels if learned_variance else None
    network = tiny(
        kind, image_size=(height, width), in_channels=channels, out_channels=out_channels, patch_size=patch_size
    )
    with torch.no_grad():
        output = network(*inputs(n, channels, height, width))
    assert output.shape == (n, channels * (1 + learned_variance), height, width)
    assert output.dtype == torch.float32


@KINDS
def test_shapes_are_known_without_computing(kind):
    with torch.device("meta"):
        network = tiny(kind, image_size=(16, 24), in_channels=4, out_channels=8, num_classes=3)
        output = network(torch.empty(2, 4, 16, 24), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
        output.sum().backward()
    assert (output.device.type, output.dtype, output.shape) == ("meta", torch.float32, (2, 8, 16, 24))
    assert all(parameter.grad.shape == parameter.shape for parameter in network.parameters())


@KINDS
def test_one_number_means_a_square(kind):
    one, two = randomised(kind, image_size=16), randomised(kind, image_size=(16, 16))
    assert torch.equal(one(*inputs()), two(*inputs()))


@KINDS
def test_a_new_network_predicts_zero_and_learns_from_there(kind):
    network = tiny(kind, num_classes=3, out_channels=6)
    x_t, t = inputs()
    output = network(x_t, t, torch.tensor([0, 1, 2]))
    assert not output.any()
    before = [p.clone() for p in network.parameters()]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(3):  # layers behind zeros learn once those are not zero
        optimizer.zero_grad()
        (network(x_t, t, torch.tensor([0, 1, 2])) - 1).square().mean().backward()
        optimizer.step()
    pairs = zip(before, network.named_parameters(), strict=True)
    assert [name for old, (name, new) in pairs if torch.equal(old, new)] == []
    assert (network(x_t, t, torch.tensor([0, 1, 2])) - 1).square().mean() < 1


@KINDS
@pytest.mark.parametrize("patch_size", [1, 4])
@pytest.mark.parametrize("num_classes", [None, 2])
def test_every_parameter_gets_a_gradient(kind, patch_size, num_classes):
    """As distributed training requires: no parameter is unused, with the null class or without."""
    network = randomised(kind, patch_size=patch_size, num_classes=num_classes, null_class=num_classes is not None)
    x_t, t = inputs()
    network(x_t, t, num_classes and torch.tensor([0, 1, 2])).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@KINDS
def test_time_and_class_change_the_output(kind):
    network = randomised(kind, num_classes=2, null_class=True)
    x_t, t = inputs(1)
    outputs = [network(x_t, t + dt, torch.tensor([y])) for dt in (0, 1) for y in (0, 1, 2)]
    for i, one in enumerate(outputs):
        assert all(not torch.allclose(one, other, atol=1e-3) for other in outputs[:i])


@KINDS
def test_to_be_told_nothing_is_to_be_told_that_nothing_was_done(kind):
    network = randomised(kind, augmented=True)
    x_t, t = inputs(2)
    nothing = torch.zeros(2, AUGMENTATION_PARAMETERS)
    assert torch.equal(network(x_t, t), network(x_t, t, augmentation=nothing))
    turned = nothing.clone()
    turned[1, 3] = 1
    difference = (network(x_t, t, augmentation=turned) - network(x_t, t)).flatten(1).abs().amax(1)
    assert difference[0] < 1e-5 < 1e-3 < difference[1]


@KINDS
def test_null_class_is_a_row_of_its_own(kind):
    assert tiny(kind, num_classes=5).class_embedding.num_embeddings == 5
    network = randomised(kind, num_classes=5, null_class=True)
    assert (network.num_classes, network.class_embedding.num_embeddings) == (5, 6)
    x_t, t = inputs(1)
    null = torch.tensor([5])
    before = network(x_t, t, null)
    with torch.no_grad():
        network.class_embedding.weight[:5] += 1
    assert torch.equal(network(x_t, t, null), before)


@KINDS
@pytest.mark.parametrize("patch_size", [1, 2])
def test_every_pixel_goes_in_and_comes_out_in_its_place(kind, patch_size):
    """A pixel matters most to what is predicted of its own neighbourhood."""
    network = randomised(kind, image_size=(16, 24), patch_size=patch_size)
    x_t, t = inputs(1, height=16, width=24)
    x_t.requires_grad_()
    for row, column in [(0, 0), (3, 20), (13, 6)]:
        (gradient,) = torch.autograd.grad(network(x_t, t)[0, 1, row, column], x_t)
        strength = gradient[0].abs().sum(0)
        assert strength.all() or kind == "unet"  # attention sees everything
        top = divmod(int(strength.argmax()), 24)
        assert max(abs(top[0] - row), abs(top[1] - column)) <= 3


@KINDS
@pytest.mark.parametrize("patch_size", [1, 2])
def test_bfloat16_autocast_returns_float32_close_to_float32(kind, patch_size):
    network, (x_t, t) = randomised(kind, patch_size=patch_size), inputs()
    exact = network(x_t, t)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(x_t, t)
    assert output.dtype == torch.float32
    assert 0 < relative_error(output, exact) < 0.03
    gradient = gradients(network, x_t, t, torch.float32)
    assert 0 < relative_error(gradients(network, x_t, t, torch.bfloat16), gradient) < 0.03


@KINDS
def test_noise_level_and_class_are_embedded_in_float32_under_autocast(kind):
    network = randomised(kind, num_classes=2)
    t, y = torch.tensor([1.0, 998.5]), torch.tensor([0, 1])
    exact = network.embed(t, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network.embed(t, y), exact)


@KINDS
def test_samples_of_a_batch_do_not_see_each_other(kind):
    network, (x_t, t) = randomised(kind, num_classes=4), inputs()
    y = torch.tensor([3, 0, 2])
    alone = [network(x_t[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(network(x_t, t, y), torch.cat(alone), atol=1e-5, rtol=1e-5)


@KINDS
def test_dropout_acts_in_training_only(kind):
    network, (x_t, t) = randomised(kind, dropout=0.5), inputs()
    assert torch.equal(network(x_t, t), network(x_t, t))
    network.train()
    assert not torch.equal(network(x_t, t), network(x_t, t))
    network = randomised(kind).train()
    assert torch.equal(network(x_t, t), network(x_t, t))


@KINDS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 15, "patch_size": 2}, "image_size is 15; .*patch_size 2"),
        ({"image_size": (16, 18), "patch_size": 4}, "image_size is 16x18; .*patch_size 4"),
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": (16, -16)}, "image_size is 16x-16"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"out_channels": 4}, "out_channels is 4; it must be 3, or 6 with a learned variance"),
        ({"in_channels": 1, "out_channels": 3}, "out_channels is 3; it must be 1, or 2"),
        ({"num_heads": 5}, "5 heads|num_heads is 5"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"null_class": True}, "null_class"),
        ({"num_classes": 0}, "num_classes is 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(kind, change, message):
    with pytest.raises(ValueError, match=message):
        tiny(kind, **{**({"attention_resolutions": (8,)} if kind == "unet" else {}), **change})


@KINDS
def test_inputs_that_do_not_fit_are_refused(kind):
    x_t, t = inputs(2)
    conditional, unconditional = tiny(kind, num_classes=2), tiny(kind)
    y = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="y is missing"):
        conditional(x_t, t)
    with pytest.raises(ValueError, match="y was given"):
        unconditional(x_t, t, y)
    with pytest.raises(ValueError, match=r"y is \(1,\)"):
        conditional(x_t, t, y[:1])
    with pytest.raises(ValueError, match=r"t is \(\)"):
        unconditional(x_t, t[0])
    with pytest.raises(ValueError, match=r"x_t is \(2, 3, 8, 8\).* takes \(N, 3, 16, 16\)"):
        unconditional(x_t[:, :, :8, :8], t)
    with pytest.raises(ValueError, match=r"x_t is \(2, 3, 16, 16\).* takes \(N, 1, 16, 24\)"):
        tiny(kind, image_size=(16, 24), in_channels=1)(x_t, t)
