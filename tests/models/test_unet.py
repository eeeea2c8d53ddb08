from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from improved_diffusion.models.unet import Attention, ResBlock, UNet

PROJECT = Path(__file__).parent.parent.parent
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


def test_parameter_count_is_that_of_the_original():
    with torch.device("meta"):
        network = UNet(image_size=64, num_classes=101, out_channels=6)
    assert sum(p.numel() for p in network.parameters()) == 92_080_902


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_changes_the_speed_only(dtype):
    network, (x_t, t) = randomised(), inputs()
    contiguous = gradients(network, x_t, t, dtype)
    network = network.to(memory_format=torch.channels_last)
    channels_last = gradients(network, x_t.to(memory_format=torch.channels_last), t, dtype)
    error = (channels_last - contiguous).norm() / contiguous.norm()
    assert error < (1e-5 if dtype is torch.float32 else 0.02)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_channels_last_survives_every_stage(patch_size):
    network = randomised(patch_size=patch_size).to(memory_format=torch.channels_last)
    stages = [*network.encoder, network.middle, *network.decoder, network.output_norm]
    formats = []
    for stage in stages:
        stage.register_forward_hook(
            lambda _, __, output: formats.append(output.is_contiguous(memory_format=torch.channels_last))
        )
    x_t, t = inputs()
    network(x_t.to(memory_format=torch.channels_last), t)
    assert formats == [True] * len(stages)


def test_initial_weights_are_those_of_the_seed_as_ever():
    """So that a run of old settings repeats: same names, drawn in the same order."""
    torch.manual_seed(0)
    weights = UNet(**TINY, num_classes=3, null_class=True, out_channels=6).state_dict()
    assert len(weights) == 129
    for name, expected in {
        "time_embedding.0.weight": [-0.0018717051, 0.1341108978, -0.2057612836],
        "class_embedding.weight": [-0.0967199653, -1.2944170237, 0.1030615568],
        "encoder.0.0.weight": [-0.1116392985, 0.0920199677, -0.1184158400],
        "decoder.3.0.scale_shift.bias": [-0.0363781601, -0.0128766447, 0.1139862686],  # the last that is drawn
    }.items():
        torch.testing.assert_close(weights[name].flatten()[:3], torch.tensor(expected), atol=1e-7, rtol=1e-6)


def test_the_shipped_checkpoint_predicts_as_ever():
    checkpoint = torch.load(PROJECT / "pretrained/synthetic-64/checkpoints/step_0001750.pt", weights_only=True)
    network = UNet(
        image_size=64,
        num_channels=16,
        channel_multipliers=(1, 2, 4, 4),
        num_res_blocks=1,
        attention_resolutions=(8,),
        num_classes=16,
        null_class=True,
        out_channels=6,
    )
    network.load_state_dict(checkpoint["model"])
    x_t = torch.linspace(-1, 1, 3 * 64 * 64).sin().reshape(1, 3, 64, 64)
    with torch.no_grad():
        output = network.eval()(x_t, torch.tensor([300.0]), torch.tensor([2]))
    expected = [-0.2304118127, -0.0239388943, -0.2556166053, 0.3134478927, 0.2034190893, 0.2437435985]
    torch.testing.assert_close(output[0, :, 31, 17], torch.tensor(expected), atol=1e-5, rtol=0)
    assert output.square().mean().item() == pytest.approx(0.2316366434, abs=1e-5)


def test_patches_are_pixels_to_the_layers_between():
    """On 2x2 patches the network is that of a quarter of the pixels, of 12 channels, in between the rearrangements."""
    on_patches = randomised(patch_size=2, image_size=32)
    on_pixels = randomised(in_channels=12)
    on_pixels.load_state_dict(on_patches.state_dict())
    x_t, t = inputs(size=32)
    patches = torch.stack([x_t[:, c, i::2, j::2] for c in range(3) for i in range(2) for j in range(2)], dim=1)
    expected, output = on_pixels(patches, t), on_patches(x_t, t)
    for channel in range(12):
        c, i, j = channel // 4, channel // 2 % 2, channel % 2
        torch.testing.assert_close(output[:, c, i::2, j::2], expected[:, channel])


@settings(max_examples=20, deadline=None)
@given(
    chosen=st.sets(st.sampled_from([32, 16, 8, 4])),
    num_res_blocks=st.integers(1, 3),
    patch_size=st.sampled_from([1, 2]),
    landscape=st.booleans(),
)
def test_attention_is_at_the_chosen_sizes_and_in_the_middle(chosen, num_res_blocks, patch_size, landscape):
    side = 32 * patch_size
    height, width = (side, 2 * side) if landscape else (side, side)
    network = UNet(
        image_size=(height, width),
        patch_size=patch_size,
        num_channels=8,
        channel_multipliers=(1, 1, 2, 2),
        num_res_blocks=num_res_blocks,
        attention_resolutions=tuple(chosen),
        num_heads=2,
    )
    seen: list[tuple[nn.Module, int]] = []
    for module in network.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda module, args, _: seen.append((module, args[0].shape[-2])))
    with torch.no_grad():
        network(torch.zeros(1, 3, height, width), torch.zeros(1))
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
        ({"num_channels": 15}, "num_channels is 15"),
        ({"num_channels": 0}, "num_channels is 0"),
        ({"num_heads": 5}, "num_heads is 5"),
        ({"num_heads": 32, "num_channels": 16, "attention_resolutions": (16,)}, "16 channels at size 16"),
        ({"attention_resolutions": (8, 7)}, r"attention_resolutions has \[7\]"),
        ({"attention_resolutions": (16,), "patch_size": 2}, r"has \[16\], but the feature maps are \[8, 4\]"),
        ({"image_size": (16, 24), "attention_resolutions": (12,)}, r"has \[12\], but the feature maps are \[16, 8\]"),
        ({"image_size": 20, "patch_size": 4}, "with 2 channel_multipliers and patch_size 4 it must be divisible by 8"),
        ({"patch_size": 8}, "patch_size is 8; it must be 1, 2 or 4"),
        ({"channel_multipliers": ()}, "channel_multipliers is empty"),
        ({"channel_multipliers": (1, 0)}, "channel_multipliers"),
        ({"num_res_blocks": 0}, "num_res_blocks is 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{**TINY, **change})


def test_a_compiled_block_is_one_graph_and_gives_the_same():
    """Traced alone: a C++ compiler would take long to make something of the graph."""
    block = ResBlock(8, 16, 4, dropout=0.0).to(memory_format=torch.channels_last)
    torch.nn.init.normal_(block.conv2.weight, std=0.1)
    x, embedding = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last), torch.randn(2, 4)
    results = []
    for run in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        block.zero_grad()
        y = run(x, embedding)
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad.clone() for p in block.parameters())])
    for value, expected in zip(*results, strict=True):
        assert torch.allclose(value, expected, rtol=1e-4, atol=1e-6)
