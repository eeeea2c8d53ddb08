"""The names of layers in kohya's form of adapters, which sd-scripts writes and ComfyUI and others read.

A layer is named by its path with underscores, and in SDXL's UNet by the path in the original implementation, whose
blocks are numbered through:

    diffusers   unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q
    kohya, SD   lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q
    kohya, SDXL lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

from torch import nn

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.models.base import Base

DOWN, UP, ALPHA, DORA = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"  # what a layer has
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
TEXT_MODEL = "text_model."  # left out of the paths by transformers 5.6 and later


def kohya_name(base: Base, part: str, module: str) -> str:
    """What kohya's form calls the layer `module` of the component `part`.

    Raises:
        UserError: it has no name for it.
    """
    if part != "unet":
        prefix = {"text_encoder": "lora_te1" if base.is_sdxl else "lora_te"}.get(part, "lora_te2")
        path = TEXT_MODEL + module.removeprefix(TEXT_MODEL)
    else:
        prefix = "lora_unet"
        path = original_name(module, base.unet.config) if base.is_sdxl else module
    return f"{prefix}_{path.replace('.', '_')}"


def kohya_layers(base: Base) -> dict[str, tuple[str, str]]:
    """{layer in kohya's form: component and path of the layer}, under all names that programs write."""
    layers = {}
    for part, network in {"unet": base.unet, **base.text_encoders}.items():
        for module in _matrices(network):
            names = [f"lora_unet_{module.replace('.', '_')}"] if part == "unet" else []
            with contextlib.suppress(UserError):
                names.append(kohya_name(base, part, module))
            names += [name.replace("_text_model_", "_", 1) for name in names]
            if part == "text_encoder":
                names += [re.sub("^lora_te1?_", other, name) for name in names for other in ("lora_te_", "lora_te1_")]
            layers |= dict.fromkeys(names, (part, module))
    return layers


def _matrices(network: nn.Module) -> list[str]:
    """The paths of what can have an adapter, whether it has one or not."""
    return [
        path.removesuffix(".base_layer")
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and ".lora_" not in path
    ]


def original_name(module: str, unet: Any) -> str:
    """A layer of SDXL's UNet by its name in the original implementation.

    On the way down each level has its blocks and then one that halves the feature map, after the first block, which is
    the input convolution; on the way up it has one block more, and the last of them doubles it. A block is a residual
    block, attention if the level has it, and then what doubles.

    Args:
        module: its path in diffusers.
        unet: the UNet's settings.

    Raises:
        UserError: a layer that has none.
    """
    if module in OUTSIDE:
        return OUTSIDE[module]
    if middle := MIDDLE.fullmatch(module):
        kind, index, rest = middle.groups()
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{RESNET.get(rest, rest)}"
    block = BLOCK.fullmatch(module)
    if block is None:
        raise UserError(f"the adapter has a layer {module}, which kohya's form of SDXL has no name for")
    way, level, kind, index, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
    first = level * (unet.layers_per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + unet.layers_per_block + 1}.0.op"
    if kind == "upsamplers":
        place = 2 if "Attn" in unet.up_block_types[level] else 1
        return f"output_blocks.{first + unet.layers_per_block}.{place}.conv"
    number = f"input_blocks.{1 + first + index}" if way == "down" else f"output_blocks.{first + index}"
    return f"{number}.1.{rest}" if kind == "attentions" else f"{number}.0.{RESNET.get(rest, rest)}"
