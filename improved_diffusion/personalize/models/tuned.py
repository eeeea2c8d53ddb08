"""Opening a tuned model: from a run, or from an adapter's file of this or another program."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from torch import Tensor

from improved_diffusion.checkpoint_file import read_checkpoint
from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import PersonalizeConfig
from improved_diffusion.personalize.models.adapter_file import read_adapter
from improved_diffusion.personalize.models.adapters import ADAPTER, adapted_parts, attach_adapters, remove_adapters
from improved_diffusion.personalize.models.base import Base, load_base
from improved_diffusion.personalize.models.trained import prepare, trained_parts
from improved_diffusion.run_directory import RunDirectory


@dataclass(frozen=True, eq=False)
class Tuned:
    """A tuned base, and where it came from."""

    base: Base
    config: PersonalizeConfig
    step: int
    checkpoint: Path


def load_run(
    run: RunDirectory,
    checkpoint: str | None = None,
    base: str | None = None,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    variant: str | None = None,
) -> Tuned:
    """The model of a run: the moving average of what it trained, where it keeps one.

    Args:
        run: a run of personalize.py.
        checkpoint: best, latest or a file's name; by default the best, or else the latest.
        base: where the base is now; by default where the run had it.
        device, dtype: where the model is wanted, and in what.
        variant: of the base's files; by default that of the run, unless another `base` is given.

    Raises:
        UserError: no such run, checkpoint or base, or a base of another architecture.
    """
    config = run.read_config(PersonalizeConfig)
    file = run.choose_checkpoint(checkpoint)
    state = read_checkpoint(file, ("step", "model", "ema"), mapped=True)  # not what the optimizer knew
    variant = variant or (config.variant if base is None else None)
    opened = replace(load_base(base or config.base, variant), text=config.text)
    opened.to(device, dtype, config.training.vae_precision)
    trained = prepare(opened, config)
    trained.load_state_dict(_drawn_from(state))
    if config.method == "full":
        opened.to(device, dtype, config.training.vae_precision)  # float32 was for training
    return Tuned(opened, config, state["step"], file)


def attach_run(base: Base, run: RunDirectory, name: str) -> tuple[PersonalizeConfig, int]:
    """Give `base` the adapters of a LoRA run, of the checkpoint that `load_run` would take, under a `name` of their
    own, in place. `choose_adapters` then chooses among several.

    Returns:
        The run's settings, and the bytes that the adapters take.

    Raises:
        UserError: no such run, one that trained no adapters, or one on another base. The base is then as it was.
    """
    config = lora_config(run)
    state = _drawn_from(read_checkpoint(run.choose_checkpoint(None), ("step", "model", "ema")))
    try:
        attach_adapters(base, config.adapter, config.train_text_encoder, name=name)
        trained = trained_parts(base)
        trained.load_state_dict({key.replace(f".{ADAPTER}.", f".{name}."): value for key, value in state.items()})
    except Exception:  # memory that is short, too
        remove_adapters(base, name)
        raise
    return config, sum(parameter.nbytes for parameter in trained.parameters.values())


def lora_config(run: RunDirectory) -> PersonalizeConfig:
    """The settings of a LoRA run. Raises UserError where it is none."""
    config = run.read_config(PersonalizeConfig)
    if config.method != "lora":
        raise UserError(f"{run.path} is a run of the method {config.method}: only adapters (lora) share a base")
    return config


def _drawn_from(state: dict[str, Any]) -> dict[str, Tensor]:
    """Of a checkpoint, the weights that pictures are drawn from."""
    return next(iter(state["ema"].values())) if state["ema"] else state["model"]


def load_adapter(base: Base, file: Path, allow_unknown: bool = False, name: str = ADAPTER) -> tuple[int, int]:
    """Give `base` the adapters in a .safetensors file, of diffusers' or kohya's form, in place.

    Args:
        base: which has none of that name yet.
        file: the adapters.
        allow_unknown: leave out layers that the base lacks, or that are no LoRA.
        name: that they get. `choose_adapters` chooses among several.

    Returns:
        How many of the file's layers were taken, and how many it has.

    Raises:
        UserError: no such file, a damaged one, or adapters of another architecture: no layer that the base has, or,
            unless `allow_unknown`, one that it lacks.
    """
    if not file.is_file():
        raise UserError(f"there is no adapter at {file}")
    with _saying_what_is_wrong(base, file):
        read = read_adapter(base, file)
    total = read.known + len(read.unknown)
    if not read.known:
        raise UserError(f"the adapter {file} fits no layer of {base.name}: it is of another architecture")
    if read.unknown and not allow_unknown:
        raise UserError(
            f"{base.name} knows {read.known} of the {total} layers of the adapter {file}, and for one not "
            f"{read.unknown[0]}: it is of another architecture or kind; --allow-unknown takes those {read.known}"
        )
    with _saying_what_is_wrong(base, file):  # as diffusers' load_lora_weights does, which loses the settings of a dict
        common = {"adapter_name": name, "metadata": read.settings, "_pipeline": base.pipeline}
        base.pipeline.load_lora_into_unet(read.weights, None, base.unet, low_cpu_mem_usage=True, **common)
        for part, encoder in base.text_encoders.items():
            base.pipeline.load_lora_into_text_encoder(
                read.weights, None, encoder, prefix=part, low_cpu_mem_usage=True, **common
            )
            # transformers drops the magnitudes of DoRA, whose keys do not end as others do.
            magnitudes = {
                key.removeprefix(f"{part}."): weight
                for key, weight in read.weights.items()
                if key.startswith(f"{part}.") and "lora_magnitude_vector" in key
            }
            if magnitudes:
                set_peft_model_state_dict(encoder, magnitudes, adapter_name=name)
    for part in adapted_parts(base).values():
        part.eval()  # PEFT's layers come in training, and a file may name a dropout
    return read.known, total


@contextlib.contextmanager
def _saying_what_is_wrong(base: Base, file: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # diffusers and PEFT raise almost anything
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        kind = "SDXL" if base.is_sdxl else "Stable Diffusion 1 or 2"
        raise UserError(
            f"the adapter {file} is damaged, or of another architecture than {base.name}, which is {kind} ({reason}...)"
        ) from error
