"""Writing and reading one checkpoint: a file of tensors and plain values, whole or refused."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write

# What reading a damaged or foreign file can raise, depending on where the damage is.
DAMAGE = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, struct.error)


def write_checkpoint(file: Path, state: dict[str, Any]) -> None:
    """Write `state`, of tensors and plain values only, so that a kill leaves the whole file or none.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(file) as temporary, temporary.open("wb") as stream:
        try:
            torch.save(state, stream)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, which torch covers with a complaint of its own
                raise error.__context__ from None
            raise


def read_checkpoint(file: Path, keys: tuple[str, ...] = (), mapped: bool = False) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU.

    Args:
        file: the checkpoint.
        keys: that it must have.
        mapped: leave tensors in the file until they are looked at: of a large one that is needed in part.

    Raises:
        UserError: no such file; a damaged one, where the message names the other checkpoints beside it; or one without
            some of `keys`, or with something else under them.
    """
    if not file.is_file():
        there = ", ".join(sorted(other.name for other in file.parent.glob("step_*.pt")))
        raise UserError(f"no checkpoint at {file}" + (f"; there are {there}" if there else ""))
    try:
        if mapped:
            _require_whole(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (*DAMAGE, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        others = sorted(f.name for f in file.parent.glob("step_*.pt") if f != file)
        advice = f"use another one: {', '.join(others)}" if others else "there is no other one beside it"
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise UserError(f"the checkpoint {file} is damaged ({reason}); {advice}") from error
    missing = [key for key in keys if not isinstance(state, dict) or key not in state]
    if missing:
        raise UserError(f"the checkpoint {file} cannot be used for this: it holds no {', '.join(missing)}")
    for key in keys:
        if key in IS_USABLE and not IS_USABLE[key](state[key]):
            raise UserError(f"the checkpoint {file} is damaged: its {key} is a {type(state[key]).__name__} of no use")
    return state


def _require_whole(file: Path) -> None:
    """Compare the checksums, which torch does only as it reads. Raises ValueError or BadZipFile where they differ."""
    with zipfile.ZipFile(file) as archive:
        if (broken := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {broken} is another")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(weight, torch.Tensor) and weight.is_floating_point()
        for name, weight in value.items()
    )


def _is_average(rate: Any, weights: Any) -> bool:
    return isinstance(rate, str) and re.fullmatch(r"[0-9.e-]*[0-9]", rate) is not None and _is_weights(weights)


def _is_averages(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_average, value, value.values()))


# What readers rely on, of the keys that a checkpoint may have.
IS_USABLE: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "images_seen": _is_count,
    "prior_seen": _is_count,
    "model": _is_weights,
    "ema": lambda value: value is None or _is_averages(value),
    "power_ema": _is_averages,
    "optimizer": lambda value: isinstance(value, dict),
    "class_names": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
}
