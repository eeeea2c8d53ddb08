"""A model in one .safetensors file: weights, and in the file's metadata its settings, classes and origin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from improved_diffusion.config import Config, run_type
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.settings import settings_of, to_plain

FORMAT = "improved_diffusion-1"


@dataclass(frozen=True)
class ExportedModel:
    """What such a file holds. `origin` says what it was made of; `ema_rate` is None for weights that are no average."""

    weights: Mapping[str, Tensor]
    config: Config
    class_names: tuple[str, ...]
    step: int
    ema_rate: float | None
    origin: dict[str, Any]


def write_exported(file: Path, model: ExportedModel) -> None:
    """Write `model` to `file`, whole or not at all."""
    about = {
        "class_names": list(model.class_names),
        "step": model.step,
        "ema_rate": model.ema_rate,
        "origin": model.origin,
    }
    metadata = {
        "format": FORMAT,
        "settings": yaml.safe_dump(to_plain(model.config), sort_keys=False),
        "about": json.dumps(about),
    }
    with atomic_write(file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in model.weights.items()}, temporary, metadata)


def read_exported(file: Path) -> ExportedModel:
    """The model in `file`, on the CPU.

    Raises:
        UserError: no such file, a damaged one, or one that is no model of this project.
    """
    if not file.is_file():
        raise UserError(f"no model at {file}")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged, or no .safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{file} holds no model of this project: make one with scripts/export_model.py")
    try:
        settings, about = yaml.safe_load(metadata["settings"]), json.loads(metadata["about"])
        return ExportedModel(
            weights,
            settings_of(run_type(settings), settings, str(file)),
            tuple(map(str, about["class_names"])),
            int(about["step"]),
            None if about["ema_rate"] is None else float(about["ema_rate"]),
            dict(about["origin"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{file} is damaged: its description cannot be read ({error})") from error
