from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from improved_diffusion.models.unet import Attention, UNet, sinusoidal_embedding

TINY = {
    "image_size": 16,
    "num_channels": 16,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (8,),
    "num_heads": 2,
}


def randomised(**kwargs) -> UNet:
    """A tiny network, in evaluation mode, whose zero-initialised layers are drawn too, so that every path counts."""
    torch.manual_seed(0)
    network = UNet(**{**TINY, **kwargs}).eval()
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
    return network


def inputs(n: int = 3, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, size, size, generator=generator), torch.arange(n) * 300


def gradients(network: UNet, x_t: torch.Tensor, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        output = network(x_t, t)
    network.zero_grad()
    output.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def test_sinusoidal_embedding_is_cosines_then_sines_of_geometric_frequencies():
    t = torch.tensor([0.0, 0.5, 999.0], dtype=torch.float64)
    frequencies = [10_000 ** (-i / 4) for i in range(4)]
    expected = [[f(time * w) for f in (math.cos, math.sin) for w in frequencies] for time in t.tolist()]
    torch.testing.assert_close(sinusoidal_embedding(t, 8), torch.tensor(expected), atol=1e-4, rtol=0)
    integers = torch.tensor([0, 7, 999])
    assert torch.equal(sinusoidal_embedding(integers, 8), sinusoidal_embedding(integers.float(), 8))


def test_parameter_count_is_that_of_the_original():
    with torch.device("meta"):
        network = UNet(image_size=64, num_classes=101, out_channels=6)
    assert sum(p.numel() for p in network.parameters()) == 92_080_902


def test_shapes_are_known_without_computing():
    with torch.device("meta"):
        network = UNet(**TINY, num_classes=3, out_channels=6)
        output = network(torch.empty(2, 3, 16, 16), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
        output.sum().backward()
    assert (output.device.type, output.dtype, output.shape) == ("meta", torch.float32, (2, 6, 16, 16))
    assert all(parameter.grad.shape == parameter.shape for parameter in network.parameters())


def test_a_new_network_predicts_zero_and_learns_from_there():
    network = UNet(**TINY, num_classes=3, out_channels=6)
    x_t, t = inputs()
    output = network(x_t, t, torch.tensor([0, 1, 2]))
    assert output.shape == (3, 6, 16, 16)
    assert not output.any()
    (output - 1).square().mean().backward()
    assert network.output_conv.weight.grad.any()


def test_every_parameter_gets_a_gradient():
    """As distributed training requires: no parameter is unused, with the null class or without."""
    network = randomised(num_classes=2, null_class=True)
    x_t, t = inputs()
    network(x_t, t, torch.tensor([0, 1, 2])).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_time_and_class_change_the_output():
    network = randomised(num_classes=2, null_class=True)
    x_t, t = inputs(1)
    outputs = [network(x_t, t + dt, torch.tensor([y])) for dt in (0, 1) for y in (0, 1, 2)]
    for i, one in enumerate(outputs):
        assert all(not torch.allclose(one, other, atol=1e-3) for other in outputs[:i])


def test_null_class_is_a_row_of_its_own():
    assert UNet(**TINY, num_classes=5).class_embedding.num_embeddings == 5
    network = randomised(num_classes=5, null_class=True)
    assert (network.num_classes, network.class_embedding.num_embeddings) == (5, 6)
    x_t, t = inputs(1)
    null = torch.tensor([5])
    before = network(x_t, t, null)
    with torch.no_grad():
        network.class_embedding.weight[:5] += 1
    assert torch.equal(network(x_t, t, null), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_changes_the_speed_only(dtype):
    network, (x_t, t) = randomised(), inputs()
    contiguous = gradients(network, x_t, t, dtype)
    network = network.to(memory_format=torch.channels_last)
    channels_last = gradients(network, x_t.to(memory_format=torch.channels_last), t, dtype)
    error = (channels_last - contiguous).norm() / contiguous.norm()
    assert error < (1e-5 if dtype is torch.float32 else 0.02)


def test_channels_last_survives_every_stage():
    network = randomised().to(memory_format=torch.channels_last)
    stages = [*network.encoder, network.middle, *network.decoder, network.output_norm]
    formats = []
    for stage in stages:
        stage.register_forward_hook(
            lambda _, __, output: formats.append(output.is_contiguous(memory_format=torch.channels_last))
        )
    x_t, t = inputs()
    network(x_t.to(memory_format=torch.channels_last), t)
    assert formats == [True] * len(stages)


def test_bfloat16_autocast_returns_float32_close_to_float32():
    network, (x_t, t) = randomised(), inputs()
    exact = network(x_t, t)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(x_t, t)
    assert output.dtype == torch.float32
    assert 0 < (output - exact).norm() / exact.norm() < 0.03


def test_bfloat16_gradients_are_close_to_float32():
    network, (x_t, t) = randomised(), inputs()
    exact = gradients(network, x_t, t, torch.float32)
    assert 0 < (gradients(network, x_t, t, torch.bfloat16) - exact).norm() / exact.norm() < 0.03


def test_samples_of_a_batch_do_not_see_each_other():
    network, (x_t, t) = randomised(num_classes=4), inputs()
    y = torch.tensor([3, 0, 2])
    alone = [network(x_t[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(network(x_t, t, y), torch.cat(alone), atol=1e-5, rtol=0)


def test_dropout_acts_in_training_only():
    network, (x_t, t) = randomised(dropout=0.5), inputs()
    assert torch.equal(network(x_t, t), network(x_t, t))
    network.train()
    assert not torch.equal(network(x_t, t), network(x_t, t))
    network = randomised().train()
    assert torch.equal(network(x_t, t), network(x_t, t))


@settings(max_examples=20, deadline=None)
@given(
    chosen=st.sets(st.sampled_from([32, 16, 8, 4])),
    num_res_blocks=st.integers(1, 3),
)
def test_attention_is_at_the_chosen_sizes_and_in_the_middle(chosen, num_res_blocks):
    network = UNet(
        image_size=32,
        num_channels=8,
        channel_multipliers=(1, 1, 2, 2),
        num_res_blocks=num_res_blocks,
        attention_resolutions=tuple(chosen),
        num_heads=2,
    )
    seen: list[tuple[nn.Module, int]] = []
    for module in network.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda module, args, _: seen.append((module, args[0].shape[-1])))
    network(*inputs(1, 32))
    middle = {id(m) for m in network.middle.modules()}
    assert [size for module, size in seen if id(module) in middle] == [4]
    down = [size for size in (32, 16, 8, 4) if size in chosen for _ in range(num_res_blocks)]
    up = [size for size in (4, 8, 16, 32) if size in chosen for _ in range(num_res_blocks + 1)]
    assert [size for module, size in seen if id(module) not in middle] == down + up


@pytest.mark.parametrize(("channels", "groups"), [(32, 32), (96, 32), (128, 32), (48, 16), (16, 16), (6, 2)])
def test_groups_are_32_or_the_most_that_fit(channels, groups):
    network = UNet(image_size=8, num_channels=channels, channel_multipliers=(1,), attention_resolutions=(), num_heads=1)
    assert network.output_norm.num_groups == groups


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 15}, "image_size is 15"),
        ({"image_size": 0}, "image_size is 0"),
        ({"num_channels": 15}, "num_channels is 15"),
        ({"num_channels": 0}, "num_channels is 0"),
        ({"num_heads": 5}, "num_heads is 5"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads": 32, "num_channels": 16, "attention_resolutions": (16,)}, "16 channels at 16x16"),
        ({"attention_resolutions": (8, 7)}, r"attention_resolutions has \[7\]"),
        ({"channel_multipliers": ()}, "channel_multipliers is empty"),
        ({"channel_multipliers": (1, 0)}, "channel_multipliers"),
        ({"num_res_blocks": 0}, "num_res_blocks is 0"),
        ({"out_channels": 4}, "out_channels is 4"),
        ({"null_class": True}, "null_class"),
        ({"num_classes": 0}, "num_classes is 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{**TINY, **change})


def test_inputs_that_do_not_fit_are_refused():
    x_t, t = inputs(2)
    conditional, unconditional = UNet(**TINY, num_classes=2), UNet(**TINY)
    y = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="y is missing"):
        conditional(x_t, t)
    with pytest.raises(ValueError, match="y was given"):
        unconditional(x_t, t, y)
    with pytest.raises(ValueError, match=r"y is \(1,\)"):
        conditional(x_t, t, y[:1])
    with pytest.raises(ValueError, match=r"t is \(\)"):
        unconditional(x_t, t[0])
    with pytest.raises(ValueError, match=r"x_t is \(2, 3, 8, 8\)"):
        unconditional(x_t[:, :, :8, :8], t)
