"""From the weights of openai/improved-diffusion, which names them otherwise, to a `UNet`.

Such a file is a bare state dict. `STAGES` and `LAYERS` are the whole mapping between its names and those of `UNet`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from improved_diffusion.checkpoint_file import read_checkpoint
from improved_diffusion.errors import UserError
from improved_diffusion.models.unet import UNet

# A name is a stage, positions in it, a layer if there are several, and `weight` or `bias`: `encoder.1.0.conv1.weight`
# here is `input_blocks.1.0.in_layers.2.weight` there. Positions are the same.
STAGES = {
    # here: there
    "time_embedding": "time_embed",
    "class_embedding": "label_emb",
    "encoder": "input_blocks",
    "middle": "middle_block",
    "decoder": "output_blocks",
    "output_norm": "out.0",
    "output_conv": "out.2",
}
LAYERS = {
    # here: there
    "norm1": "in_layers.0",  # ResBlock
    "conv1": "in_layers.2",
    "scale_shift": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
    "norm": "norm",  # Attention
    "qkv": "qkv",
    "out": "proj_out",
    "strided_conv": "op",  # Downsample
    "conv": "conv",  # Upsample
}
CONVOLUTIONS_THERE = ("qkv", "out")  # linear here and 1-d convolutions of width 1 there: weights (out, in, 1)

NAME = re.compile(rf"({'|'.join(STAGES)})((?:\.\d+)*)(?:\.({'|'.join(LAYERS)}))?\.(weight|bias)")

IMAGE_SIZES = {(1, 2, 2, 2): 32, (1, 2, 3, 4): 64, (1, 1, 2, 2, 4, 4): 256}  # by channel multipliers, in the original


def original_name(name: str) -> str:
    """What openai/improved-diffusion calls the parameter `name` of a `UNet`."""
    match = NAME.fullmatch(name)
    assert match is not None
    stage, positions, layer, kind = match.groups()
    return STAGES[stage] + positions + (f".{LAYERS[layer]}" if layer else "") + f".{kind}"


def original_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape that it has there."""
    is_convolution = name.endswith(tuple(f".{layer}.weight" for layer in CONVOLUTIONS_THERE))
    return (*shape, 1) if is_convolution else tuple(shape)


def load_checkpoint(path: Path | str, *, image_size: int | None = None, num_heads: int = 4) -> UNet:
    """The network in a checkpoint of openai/improved-diffusion, in float32 and evaluation mode, on the CPU.

    Args:
        path: a file of theirs, such as `imagenet64_uncond_100M_1500K.pt` or `ema_0.9999_200000.pt`.
        image_size: height and width in pixels; by default what the channel multipliers imply there (32, 64 or 256).
        num_heads: attention heads, which cannot be read from the weights; 4 in the published models.

    Raises:
        UserError: no such file, a damaged one, or another architecture; the message names what differs.
    """
    return read_network(path, image_size, num_heads)[0]


def read_network(path: Path | str, image_size: int | None, num_heads: int) -> tuple[UNet, dict[str, Any]]:
    """What `load_checkpoint` returns, and the keyword arguments that make such a `UNet`."""
    weights = read_checkpoint(Path(path))
    try:
        settings = infer_settings(weights, image_size, num_heads)
        with torch.device("meta"):
            network = UNet(**settings)
        check_weights(network, weights)
    except ValueError as error:
        raise UserError(f"cannot import {path}: {error}") from error
    own = {
        name: weights[original_name(name)].to(torch.float32).reshape(parameter.shape)
        for name, parameter in network.named_parameters()
    }
    network.load_state_dict(own, assign=True)
    return network.eval(), settings


def infer_settings(weights: Mapping[str, Tensor], image_size: int | None, num_heads: int) -> dict[str, Any]:
    """The keyword arguments of the `UNet` that `weights` belong to, from their names and shapes.

    Reads the first residual block of each resolution; whether the rest agrees is for `check_weights` to say.
    Raises ValueError for weights of another architecture.
    """
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError("it does not hold a state dict, names and tensors only")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    try:
        num_channels, in_channels = shapes["input_blocks.0.0.weight"][:2]
        if in_channels != 3:
            raise ValueError(f"its input has {in_channels} channels; upsampling models, with 6, are not supported")
        levels: list[list[int]] = [[]]  # indices of the input blocks at each resolution
        index = 1
        while any(name.startswith(f"input_blocks.{index}.") for name in shapes):
            if f"input_blocks.{index}.0.op.weight" in shapes:
                levels.append([])
            else:
                levels[-1].append(index)
            index += 1
        if len(levels) == 1:
            raise ValueError("it has no input_blocks.*.0.op: a guided-diffusion model with resblock_updown, perhaps")
        first_blocks = [f"input_blocks.{level[0]}" for level in levels]
        channels = [shapes[f"{block}.0.in_layers.2.weight"][0] for block in first_blocks]
        if shapes[f"{first_blocks[0]}.0.emb_layers.1.weight"][0] != 2 * channels[0]:
            raise ValueError("its residual blocks have no scale-shift norm (use_scale_shift_norm False): not supported")
        multipliers = tuple(c // num_channels for c in channels)
        image_size = image_size or IMAGE_SIZES.get(multipliers)
        if image_size is None:
            raise ValueError(f"the image size does not follow from channel multipliers {multipliers}: give it")
        return {
            "image_size": image_size,
            "num_channels": num_channels,
            "channel_multipliers": multipliers,
            "num_res_blocks": len(levels[0]),
            "attention_resolutions": tuple(
                image_size >> level for level, block in enumerate(first_blocks) if f"{block}.1.qkv.weight" in shapes
            ),
            "num_heads": num_heads,
            "num_classes": shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
            "out_channels": shapes["out.2.weight"][0],
        }
    except KeyError as error:
        raise ValueError(f"it is not an improved-diffusion UNet: it has no {error.args[0]}") from error
    except IndexError as error:
        raise ValueError("it is not an improved-diffusion UNet: it has resolutions without residual blocks") from error


def check_weights(network: UNet, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming tensors, unless `weights` has just the names and shapes that `network` has there."""
    expected = {original_name(n): original_shape(n, p.shape) for n, p in network.named_parameters()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    differences = {
        "missing": sorted(expected.keys() - given.keys()),
        "unknown": sorted(given.keys() - expected.keys()),
        "of another shape": sorted(n for n in expected.keys() & given.keys() if expected[n] != given[n]),
    }
    found = [f"{len(names)} {what} ({_first(names)})" for what, names in differences.items() if names]
    if found:
        raise ValueError(f"its tensors are not those of an improved-diffusion UNet: {'; '.join(found)}")


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
