"""Where a model is loaded from: a run directory, a checkpoint, an exported file, or the project itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from improved_diffusion.checkpoint_file import read_checkpoint
from improved_diffusion.config import PRETRAINED, Config
from improved_diffusion.errors import UserError
from improved_diffusion.files import file_sha256
from improved_diffusion.models.build import build_network, set_weights
from improved_diffusion.run_directory import RunDirectory, is_run_directory
from improved_diffusion.runtime.devices import sampling_precision, usable_device
from improved_diffusion.sampling.model import Model, ModelCard
from improved_diffusion.sampling.model_file import SUFFIX, read_model_file
from improved_diffusion.sampling.posthoc import averaged_weights
from improved_diffusion.sampling.series import selection
from improved_diffusion.settings import read_settings

SHIPPED = Path(__file__).parents[2] / "pretrained" / "food101-64" / f"food101-64{SUFFIX}"


def load(
    path: Path | str,
    checkpoint: str | None = None,
    ema: float | None = None,
    device: torch.device | str | None = None,
    *,
    ema_length: float | None = None,
) -> Model:
    """The model at `path`.

    Args:
        path: a run directory, a checkpoint in one (`runs/hybrid/checkpoints/step_0015000.pt`), an exported
            `.safetensors` file, or "pretrained", the model that ships with the project.
        checkpoint: of a run directory: `best`, `latest`, or a file's name; by default the best one, or else the latest.
        ema: rate of the moving average of the weights; by default the first that is kept, or else the weights
            themselves. An exported file has one.
        device: where the model is wanted: cpu, cuda, cuda:1 ...; by default a GPU if there is one.
        ema_length: in place of `ema`: the relative length of an average that is made now, of those that a run with
            `training.ema_lengths` kept (see `averaged_weights`).

    Raises:
        UserError: nothing usable at `path`, no such checkpoint, a damaged one, one without that moving average, or a
            device that cannot be used.
    """
    if ema is not None and ema_length is not None:
        raise UserError(f"choose one average of the weights: by its rate {ema}, or by its relative length {ema_length}")
    device, path = usable_device(device), Path(path)
    if _is_pretrained(path):
        path = _shipped()
    if not _is_model_file(path):
        if path.is_file():
            raise UserError(f"{path} is no model: give a run directory, a checkpoint .pt in one, or a {SUFFIX} file")
        return _load_run(RunDirectory(path), checkpoint, ema, ema_length, device)
    if checkpoint is not None:
        raise UserError(f"{path} is one model: checkpoint {checkpoint} can only be chosen of a run directory")
    if path.suffix == SUFFIX:
        if ema_length is not None:
            raise UserError(f"{path} is one model: an average of relative length {ema_length} is made of a run's")
        return _load_file(path, ema, device)
    run = RunDirectory(path.parent.parent)
    if run.checkpoints / path.name != path or not run.config_file.is_file():
        raise UserError(
            f"{path} is not in the checkpoints of a run directory, whose config.yaml says what it is; one of "
            "openai/improved-diffusion is imported with python -m improved_diffusion.models.openai"
        )
    return _load_run(run, path.name, ema, ema_length, device)


def is_model(path: Path | str) -> bool:
    """Whether `path` is something that `load` means to load, rather than a set of images."""
    path = Path(path)
    return is_run_directory(path) or _is_pretrained(path) or _is_model_file(path)


def newest_run() -> Path:
    """The run of the pixel job under runs/ that saved last, or else the model that ships with the project.

    Raises:
        UserError: there is neither.
    """
    pointers = sorted(Path("runs").glob("**/checkpoints/latest"), key=lambda pointer: pointer.stat().st_mtime)
    runs = (pointer.parent.parent for pointer in reversed(pointers))
    return next(filter(is_pixel_run, runs), None) or _shipped()


def is_pixel_run(path: Path) -> bool:
    """Whether the run at `path` is one of the pixel job: its config has no keys but that job's."""
    try:
        return read_settings(path / "config.yaml").keys() <= {field.name for field in dataclasses.fields(Config)}
    except UserError:
        return False


def _is_model_file(path: Path) -> bool:
    return path.suffix in (".pt", SUFFIX) and not path.is_dir()


def _is_pretrained(path: Path) -> bool:
    return str(path) == PRETRAINED and not is_run_directory(path)


def _shipped() -> Path:
    if not SHIPPED.is_file():
        raise UserError(f"the model that ships with the project is not at {SHIPPED}: name a run, or train one first")
    return SHIPPED


def _load_run(
    run: RunDirectory, checkpoint: str | None, ema: float | None, ema_length: float | None, device: torch.device
) -> Model:
    config, file = run.read_config(), run.choose_checkpoint(checkpoint)
    state = read_checkpoint(file, ("step", "model", "ema", "class_names"))
    if ema_length is None:
        weights, rate = _kept_average(state, ema, file)
    else:
        weights, rate = averaged_weights(run, state["step"], ema_length), None
    entries = [entry for entry in run.read_provenance() if isinstance(entry, dict)]
    card = ModelCard(
        config=config,
        class_names=tuple(state["class_names"]),
        step=state["step"],
        ema_rate=rate,
        ema_length=ema_length,
        selected_on=selection(run, state["step"]),
        provenance={"run": run.path.resolve().name, "checkpoint": file.name, **(entries[-1] if entries else {})},
    )
    return _model_of(card, weights, file, run.path, device)


def _kept_average(state: dict[str, Any], rate: float | None, file: Path) -> tuple[dict[str, Tensor], float | None]:
    """The moving average of that rate in a checkpoint, or the first, or else the weights themselves; and its rate."""
    averages = {float(name): weights for name, weights in (state["ema"] or {}).items()}
    if rate is not None and rate not in averages:
        stored = f"it has those of {', '.join(map(str, averages))}" if averages else "it has none"
        raise UserError(f"{file} has no moving average of rate {rate}: {stored}")
    rate = next(iter(averages), None) if rate is None else rate
    return (state["model"] if rate is None else averages[rate]), rate


def _load_file(file: Path, ema: float | None, device: torch.device) -> Model:
    card, weights = read_model_file(file)
    if ema not in (None, card.ema_rate):
        raise UserError(f"{file} has no moving average of rate {ema}: it has that of {card.ema_rate}")
    return _model_of(card, weights, file, file, device)


def _model_of(card: ModelCard, weights: dict[str, Tensor], file: Path, source: Path, device: torch.device) -> Model:
    network = build_network(card.config, len(card.class_names))
    set_weights(network, weights)
    network.to(device).to(memory_format=torch.channels_last).eval()
    return Model(
        **vars(card),
        network=network,
        device=device,
        precision=sampling_precision(card.config.training.precision, device),
        checkpoint=file,
        checkpoint_sha256=file_sha256(file),
        source=source,
    )
