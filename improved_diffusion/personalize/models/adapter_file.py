"""Reading adapters' files, in the forms of diffusers and of kohya: which of their layers a base has.

diffusers itself passes over layers that it does not find, and over what its names leave open.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.models.kohya import ALPHA, DORA, DOWN, UP, kohya_layers

MATRIX = re.compile(r"[._]lora[._]")  # where the name of a layer ends in diffusers' form, old or new
TEXT_LAYERS = {".to_q": ".q_proj", ".to_k": ".k_proj", ".to_v": ".v_proj", ".to_out": ".out_proj"}  # of the old form


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """The layers of an adapter's file: those of a base, as diffusers loads them, and the names of the others."""

    weights: dict[str, Tensor]  # in diffusers' form
    settings: dict[str, Any] | None  # those of PEFT, {component.setting: value}; None where the file has none
    known: int
    unknown: tuple[str, ...]


def read_adapter(base: Base, file: Path) -> AdapterFile:
    """The adapter in a .safetensors file, compared with the layers of `base`. Its weights are at least as precise as
    those of the base.

    Newer versions of transformers write the text encoder's layers without `text_model.`: they are found all the same.

    Raises:
        UserError: DoRA that weighs inputs, which PEFT cannot.
    """
    with safe_open(file, framework="pt") as opened:
        settings = json.loads((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "null"))
    dtype = base.unet.dtype  # which looks through all of its modules
    state = {key: _widened(tensor, dtype) for key, tensor in load_file(file).items()}
    if any(key.startswith("lora_") for key in state):
        return _read_kohya(base, file, state)
    return _read_diffusers(base, state, settings)


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, dtype)) if tensor.is_floating_point() else tensor


def _read_kohya(base: Base, file: Path, state: Mapping[str, Tensor]) -> AdapterFile:
    """By names of our own, for diffusers takes one alpha for all layers, and drops `dora_scale`."""
    places = kohya_layers(base)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        layer, _, what = key.partition(".")
        layers.setdefault(layer, {})[what] = tensor
    dora = {places[layer][0] for layer, tensors in layers.items() if layer in places and DORA in tensors}
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    unknown = []
    for layer, tensors in layers.items():
        part, module = places.get(layer, (None, ""))
        wanted = {DOWN, UP, DORA} if part in dora else {DOWN, UP}
        if part is None or set(tensors) - {ALPHA} != wanted:
            unknown.append(layer)
        else:
            found.setdefault(part, {})[module] = tensors
    weights, settings = {}, {}
    for part, modules in found.items():
        settings |= {f"{part}.{name}": value for name, value in _peft_settings(modules, part in dora).items()}
        for module, tensors in modules.items():
            layer = f"{part}.{module}"
            weights |= {f"{layer}.lora_A.weight": tensors[DOWN], f"{layer}.lora_B.weight": tensors[UP]}
            if part in dora:
                weights[f"{layer}.lora_magnitude_vector"] = _magnitudes(file, layer, tensors)
    return AdapterFile(weights, settings, len(layers) - len(unknown), tuple(unknown))


def _peft_settings(modules: Mapping[str, Mapping[str, Tensor]], dora: bool) -> dict[str, Any]:
    """PEFT's settings of one component's layers, each with the rank and the alpha that it has in the file; without an
    alpha that is the rank."""
    ranks = {module: tensors[DOWN].shape[0] for module, tensors in modules.items()}
    alphas = {
        module: tensors[ALPHA].item() if ALPHA in tensors else ranks[module] for module, tensors in modules.items()
    }
    rank, alpha = statistics.mode(ranks.values()), statistics.mode(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{module}": value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{module}": value for module, value in alphas.items() if value != alpha},
        "target_modules": list(modules),
        "use_dora": dora,
    }


def _magnitudes(file: Path, layer: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Of one layer, in PEFT's shape: (out,), of a convolution (1, out, 1, 1)."""
    scale, up = tensors[DORA], tensors[UP]
    if scale.shape[0] != up.shape[0] or scale.numel() != up.shape[0]:
        raise UserError(
            f"the adapter {file} has a DoRA that weighs the inputs of {layer}: only that of outputs can be read "
            "(LyCORIS writes it with wd_on_output=True)"
        )
    return scale.flatten() if up.dim() == 2 else scale.reshape(1, -1, 1, 1)


def _read_diffusers(base: Base, state: Mapping[str, Tensor], settings: dict[str, Any] | None) -> AdapterFile:
    parts = {"unet": base.unet, **base.text_encoders}
    modules = {f"{name}.{path}" for name, part in parts.items() for path, _ in part.named_modules()}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        layers.setdefault(MATRIX.split(key)[0], {})[key] = tensor
    weights: dict[str, Tensor] = {}
    unknown = []
    for layer, tensors in layers.items():
        found = {_find(key, modules): tensor for key, tensor in tensors.items()}
        if None in found:
            unknown.append(layer)
        else:
            weights |= found
    return AdapterFile(weights, settings, len(layers) - len(unknown), tuple(unknown))


def _find(key: str, modules: set[str]) -> str | None:
    """A key of diffusers' form as `modules` call its layer; None where they have none."""
    part, _, path = MATRIX.split(key)[0].replace(".processor", "").partition(".")
    end = path[path.rfind(".") :]
    if part == "unet":
        path += ".0" if end == ".to_out" else ""
    elif end in TEXT_LAYERS:
        path = path.removesuffix(end) + TEXT_LAYERS[end]
    if f"{part}.{path}" in modules:
        return key
    if f"{part}.text_model.{path}" in modules:
        return key.replace(f"{part}.", f"{part}.text_model.", 1)
    return None
