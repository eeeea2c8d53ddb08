"""Evaluations that can be compared: a series is a stretch of a run's evaluations.jsonl with one protocol."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from improved_diffusion.files import read_jsonl
from improved_diffusion.run_directory import RunDirectory

# What an evaluation's value depends on beside the weights. `reference_hash` is of the images' content.
PROTOCOL = (
    "features",
    "preprocessing",
    "weights_hash",
    "reference_hash",
    "n_fake",
    "generation_seed",
    "sampler",
    "sampling_steps",
    "spacing",
    "sampler_options",
    "guidance_scale",
    "guidance_interval",
    "noise",
    "ema_rate",
)

Record = dict[str, Any]


def protocol(record: Record) -> Record:
    """The protocol of a record; what it does not say is None, which equals nothing that is known."""
    return {name: record.get(name) for name in PROTOCOL}


def evaluation_series(records: Sequence[Record]) -> list[list[Record]]:
    """The records, in their order, divided wherever the protocol changes."""
    return [list(series) for _, series in itertools.groupby(records, key=protocol)]


def current_series(records: Sequence[Record], now: Record) -> list[Record]:
    """The last series, if it has the protocol of `now`, which a further evaluation would have; or else nothing."""
    *_, last = evaluation_series(records) or [[]]
    return last if last and protocol(last[0]) == protocol(now) else []


def changed(before: Record, after: Record) -> list[str]:
    """What of the protocol `after` was another in the record `before`, or was not said."""
    return [name for name, value in after.items() if before.get(name) != value]


def difference(before: Record, after: Record) -> str:
    """In what the protocol `after` differs from that of the record `before`, in words."""
    names = changed(before, after)
    return ", ".join(f"{name} {shown(before.get(name))} to {shown(after[name])}" for name in names)


def shown(value: Any) -> str:
    """A setting of a protocol, with hashes cut short."""
    return str(value)[:12]


def selection(run: RunDirectory, step: int) -> Record | None:
    """How the checkpoint of `step` was chosen, if it is the run's best one: on which set, by what, out of how many.

    What a run has not recorded is None.
    """
    if run.pointed("best") != run.checkpoint_file(step):
        return None
    measured = [record for record in read_jsonl(run.evaluations_file) if "value" in record]
    for series in reversed(evaluation_series(measured)):
        for record in series:
            if record["step"] == step:
                return {
                    "path": record.get("reference"),
                    "content_hash": record.get("reference_hash"),
                    "metric": record["metric"],
                    "candidates": len(series),
                    "generation_seed": record.get("generation_seed"),
                }
    return None
