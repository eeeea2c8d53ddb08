"""Reading adapters' files, in the forms of diffusers and of kohya: which of their layers a base has.

diffusers itself passes over layers that it does not find, and over what its names leave open.
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from improved_diffusion.personalize.models.base import Base

# Of kohya's form diffusers reads these, and drops others (`dora_scale`) or fails at them (`hada_w1_a`).
KOHYA_KEY = re.compile(r"lora_(unet|te|te1|te2)_\w+\.(lora_down\.weight|lora_up\.weight|alpha)")
MATRIX = re.compile(r"[._]lora[._]")  # where the name of a layer ends in diffusers' form, old or new
TEXT_LAYERS = {".to_q": ".q_proj", ".to_k": ".k_proj", ".to_v": ".v_proj", ".to_out": ".out_proj"}  # of the old form


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """The layers of an adapter's file: those of a base, as diffusers loads them, and the names of the others."""

    weights: dict[str, Tensor]  # in diffusers' form
    alphas: dict[str, float]  # of kohya's form
    settings: dict[str, Any] | None  # of diffusers' form: those of PEFT
    known: int
    unknown: tuple[str, ...]


def read_adapter(base: Base, file: Path) -> AdapterFile:
    """The adapter in a .safetensors file, compared with the layers of `base`.

    Newer versions of transformers write the text encoder's layers without `text_model.`: they are found all the same.
    """
    with safe_open(file, framework="pt") as opened:
        settings = json.loads((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "null"))
    parts = {"unet": base.unet, **base.text_encoders}
    modules = {f"{name}.{path}" for name, part in parts.items() for path, _ in part.named_modules()}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _with_one_alpha(load_file(file)).items():
        layers.setdefault(key.split(".")[0] if key.startswith("lora_") else MATRIX.split(key)[0], {})[key] = tensor
    weights: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    unknown = []
    for layer, tensors in layers.items():
        renamed, own_alphas = _in_diffusers_form(base, tensors)
        found = {_find(key, modules): tensor for key, tensor in renamed.items()}
        if not found or None in found:
            unknown.append(layer)
        else:
            weights |= found
            alphas |= own_alphas
    return AdapterFile(weights, alphas, settings, len(layers) - len(unknown), tuple(unknown))


def _in_diffusers_form(base: Base, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights and alphas of one layer; empty where diffusers has no name for it."""
    if any(key.startswith("lora_") and not KOHYA_KEY.fullmatch(key) for key in tensors):
        return {}, {}
    config = {"unet_config": base.unet.config} if base.is_sdxl else {}
    try:
        weights, alphas = base.pipeline.lora_state_dict(dict(tensors), **config)
    except (KeyError, ValueError, IndexError):  # half a layer, or a block with a strange number
        return {}, {}
    return weights, alphas or {}


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


def _with_one_alpha(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same adapter with the commonest alpha for all layers, for diffusers takes that for all of them, whatever
    theirs are: the others' weights are scaled instead. In diffusers' form there are no alphas."""
    alphas = {name: tensor.item() for name, tensor in state.items() if name.endswith(".alpha")}
    common = statistics.mode(alphas.values()) if alphas else None
    changed = dict(state)
    for name, alpha in alphas.items():
        up = f"{name.removesuffix('.alpha')}.lora_up.weight"
        if alpha != common and up in state:
            changed[up] = state[up] * (alpha / common)
            changed[name] = state[name].new_tensor(common)
    return changed
