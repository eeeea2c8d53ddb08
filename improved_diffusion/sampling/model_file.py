"""A model in one .safetensors file: weights and, in the file's metadata, settings, classes and where it comes from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from improved_diffusion.config_file import run_type
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.provenance import project_version
from improved_diffusion.sampling.model import Model, ModelCard
from improved_diffusion.settings import settings_of, to_plain

SUFFIX = ".safetensors"
DESCRIPTION, SUM = "improved_diffusion", "improved_diffusion_sha256"  # in the metadata; `format` is for other programs


def write_model_file(path: Path, card: ModelCard, weights: Mapping[str, Tensor]) -> None:
    """Write a model, whole or not at all. Raises UserError where it cannot be written."""
    write_described(path, {**_fields(card), "config": to_plain(card.config)}, weights)


def write_described(path: Path, description: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write `weights`, with a `description` of plain values and the sum of both in the file's metadata, whole or not at
    all. Raises UserError where it cannot be written."""
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    text = json.dumps(description)
    with atomic_write(path) as temporary:
        try:
            save_file(weights, temporary, {"format": "pt", DESCRIPTION: text, SUM: content_sha256(text, weights)})
        except SafetensorError as error:  # a full disk, which safetensors covers with an error of its own
            raise UserError(f"could not write {path}: {error}") from error


def read_model_file(path: Path) -> tuple[ModelCard, dict[str, Tensor]]:
    """The model in the file at `path`, and its weights on the CPU.

    Raises:
        UserError: no such file, a damaged one, or one that is no model of this project.
    """
    description, weights = read_described(path)
    try:
        settings = description.pop("config")
        config = settings_of(run_type(settings), settings, str(path))
        names = tuple(description.pop("class_names"))
        return ModelCard(config=config, class_names=names, **description), weights
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} was written by another version of this project ({error})") from error


def read_described(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_described` wrote: the description, and the weights on the CPU.

    Raises:
        UserError: no such file, a damaged one, or one that is none of this project.
    """
    if not path.is_file():
        raise UserError(f"no model at {path}")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged, or no {SUFFIX} file: {error}") from error
    if DESCRIPTION not in metadata:
        raise UserError(
            f"{path} holds no model of this project: one is made with python -m improved_diffusion.sampling.export"
        )
    if metadata.get(SUM) != content_sha256(metadata[DESCRIPTION], weights):
        raise UserError(f"{path} is damaged: what it holds is not what was written")
    try:
        return dict(json.loads(metadata[DESCRIPTION])), weights
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} was written by another version of this project ({error})") from error


def content_sha256(description: str, weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over the description, and the names, types, shapes and bytes of the weights."""
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def export(model: Model, path: Path, *, half: bool = False) -> None:
    """Write `model` to a .safetensors file.

    Args:
        model: from `load`.
        path: of the file, which must not be there yet.
        half: weights in float16, in half the space: pictures are then not those of the model to the bit.

    Raises:
        UserError: there is a file already, another ending, or a disk that cannot be written.
    """
    if path.suffix != SUFFIX:
        raise UserError(f"{path}: the name must end in {SUFFIX}")
    if path.exists():
        raise UserError(f"{path} exists already: choose another name")
    weights = {name: tensor.cpu() for name, tensor in model.network.state_dict().items()}
    if half:
        weights = {name: tensor.half() for name, tensor in weights.items()}
    if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        why = "larger than float16 can hold: export without --half" if half else "damaged, or training failed"
        raise UserError(f"not all weights of {bad[0]} of {model.checkpoint} are finite numbers: they are {why}")
    origin = {"checkpoint_sha256": model.checkpoint_sha256, "exported_by": project_version()}
    card = ModelCard(**{**_fields(model), "provenance": {**model.provenance, **origin}})
    write_model_file(path, card, weights)


def _fields(card: ModelCard) -> dict[str, Any]:
    return {one.name: getattr(card, one.name) for one in dataclasses.fields(ModelCard)}
