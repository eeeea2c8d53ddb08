"""Writing adapters for other programs: the diffusers form, and kohya's, which ComfyUI and others read.

Both carry the true alpha. ComfyUI reads the diffusers form only in part: without the UNet's attention, and without the
alpha. kohya.py has the names of kohya's form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.personalize.models.adapters import ADAPTER, adapted_parts, adapter_config, adapter_state
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.models.kohya import ALPHA, DORA, DOWN, UP, kohya_name

FILES = {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "kohya_lora.safetensors"}
KOHYA_PARTS = {"lora_A.weight": DOWN, "lora_B.weight": UP, "lora_magnitude_vector": DORA}
LORA_KEY = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(map(re.escape, KOHYA_PARTS))})")


def export_diffusers(base: Base, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the adapters as `load_lora_weights` of diffusers reads them. Returns the file."""
    layers, metadata = {}, {}
    for name, part in adapted_parts(base).items():
        layers[f"{name}_lora_layers"] = adapter_state(part, dtype)
        metadata[f"{name}_lora_adapter_metadata"] = adapter_config(part).to_dict()
    file = folder / FILES["diffusers"]
    with atomic_write(file) as temporary:
        base.pipeline.save_lora_weights(
            temporary.parent, weight_name=temporary.name, safe_serialization=True, **layers, **metadata
        )
    return file


def export_kohya(
    base: Base, folder: Path, dtype: torch.dtype = torch.float32, about: Mapping[str, str] | None = None
) -> Path:
    """Write the adapters in kohya's form, with what the header says `about` them. Returns the file.

    Raises:
        UserError: a layer for which that form has no name.
    """
    file = folder / FILES["kohya"]
    state = {
        key: tensor
        for name, part in adapted_parts(base).items()
        for key, tensor in kohya_state(base, name, adapter_state(part, dtype)).items()
    }
    with atomic_write(file) as temporary:
        save_file(state, temporary, metadata={"format": "pt", **(about or {})})
    return file


def kohya_state(base: Base, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter `state` of the component of that `name` under kohya's names, each layer with the alpha.

    Where layers have alphas of their own, as adapters of other programs may, they are written with the common one and
    scaled weights: the form allows several, but diffusers reads the most frequent for all.

    Raises:
        UserError: a layer for which that form has no name.
    """
    part = adapted_parts(base)[name]
    alpha = float(adapter_config(part).lora_alpha)
    renamed = {}
    for key, tensor in state.items():
        match = LORA_KEY.fullmatch(key)
        if match is None:
            raise UserError(f"the adapter has {key}, which kohya's form has no name for: use the diffusers form")
        module, what = match["module"], KOHYA_PARTS[match["part"]]
        if what == UP:
            tensor = tensor * (part.get_submodule(module).lora_alpha[ADAPTER] / alpha)
        if what == DORA:  # one for each output, in the shape that multiplies the weight
            tensor = tensor.reshape(-1, *[1] * (part.get_submodule(module).get_base_layer().weight.dim() - 1))
        layer = kohya_name(base, name, module)
        renamed[f"{layer}.{what}"] = tensor
        renamed[f"{layer}.{ALPHA}"] = torch.tensor(alpha)
    return renamed
