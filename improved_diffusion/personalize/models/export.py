"""Writing adapters for other programs: the diffusers form, and kohya's, which ComfyUI and others read.

Both carry the true alpha. ComfyUI reads the diffusers form only in part: without the UNet's attention, and without the
alpha. In kohya's form a layer is named by its path with underscores, and in SDXL's UNet by the path in the original
implementation, whose blocks are numbered through:

    diffusers   unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight
    kohya, SD   lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight
    kohya, SDXL lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.personalize.models.adapters import ADAPTER, adapted_parts, adapter_config, adapter_state
from improved_diffusion.personalize.models.base import Base

FILES = {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "kohya_lora.safetensors"}
KOHYA_PARTS = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}
LORA_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B)\.weight")
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.+)")
MIDDLE = "mid_block.attentions.0."


def export_diffusers(base: Base, folder: Path) -> Path:
    """Write the adapters as `load_lora_weights` of diffusers reads them. Returns the file."""
    layers, metadata = {}, {}
    for name, part in adapted_parts(base).items():
        layers[f"{name}_lora_layers"] = adapter_state(part)
        metadata[f"{name}_lora_adapter_metadata"] = adapter_config(part).to_dict()
    file = folder / FILES["diffusers"]
    with atomic_write(file) as temporary:
        base.pipeline.save_lora_weights(
            temporary.parent, weight_name=temporary.name, safe_serialization=True, **layers, **metadata
        )
    return file


def export_kohya(base: Base, folder: Path) -> Path:
    """Write the adapters in kohya's form. Returns the file.

    Raises:
        UserError: a layer for which that form has no name.
    """
    file = folder / FILES["kohya"]
    state = {
        key: tensor
        for name, part in adapted_parts(base).items()
        for key, tensor in kohya_state(base, name, adapter_state(part)).items()
    }
    with atomic_write(file) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    return file


def kohya_state(base: Base, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter `state` of the component of that `name` under kohya's names, each layer with the alpha.

    Where layers have alphas of their own, as adapters of other programs may, they are written with the common one and
    scaled weights: the form allows several, but diffusers reads the most frequent for all.

    Raises:
        UserError: a layer for which that form has no name.
    """
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if base.is_sdxl else "lora_te"}
    prefix = prefixes.get(name, "lora_te2")
    part = adapted_parts(base)[name]
    alpha = float(adapter_config(part).lora_alpha)
    renamed = {}
    for key, tensor in state.items():
        match = LORA_KEY.fullmatch(key)
        if match is None:
            raise UserError(f"the adapter has {key}, which kohya's form has no name for (DoRA: use the diffusers form)")
        module = match["module"]
        if match["part"] == "lora_B":
            tensor = tensor * (part.get_submodule(module).lora_alpha[ADAPTER] / alpha)
        if name == "unet" and base.is_sdxl:
            module = original_name(module, base.unet.config.layers_per_block)
        layer = f"{prefix}_{module.replace('.', '_')}"
        renamed[f"{layer}.{KOHYA_PARTS[match['part']]}"] = tensor
        renamed[f"{layer}.alpha"] = torch.tensor(alpha)
    return renamed


def original_name(module: str, layers_per_block: int) -> str:
    """A layer of SDXL's attention blocks by its name in the original implementation.

    On the way down each level has its blocks and then one that halves the feature map, after the first block, which is
    the input convolution; on the way up it has one block more.

    Raises:
        UserError: a layer elsewhere.
    """
    if module.startswith(MIDDLE):
        return f"middle_block.1.{module.removeprefix(MIDDLE)}"
    match = BLOCK.fullmatch(module)
    if match is None:
        raise UserError(f"the adapter has a layer {module}, which kohya's form of SDXL has no name for")
    way, level, index, rest = match[1], int(match[2]), int(match[3]), match[4]
    number = level * (layers_per_block + 1) + index
    return f"input_blocks.{1 + number}.1.{rest}" if way == "down" else f"output_blocks.{number}.1.{rest}"
