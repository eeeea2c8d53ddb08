"""The written record of a run: metrics.jsonl, evaluations.jsonl and TensorBoard, cut back to the step of a resume."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from improved_diffusion.errors import UserError
from improved_diffusion.files import read_jsonl, write_text
from improved_diffusion.run_directory import RunDirectory


class RunLog:
    """Writes the record of a run that starts, or goes on, at `first_step`; what it said of later steps is dropped,
    which is safe once `latest` names that step: the next resume would drop it too. A run at step 0 begins an empty one:
    a folder without checkpoints may hold the record of another run, which died before its first."""

    def __init__(self, run: RunDirectory, first_step: int):
        self.run = run
        run.remove_leftovers()
        run.turn_to(first_step)
        for file in (run.metrics_file, run.evaluations_file):
            kept = [record for record in read_jsonl(file) if first_step and record["step"] <= first_step]
            write_text(file, "".join(json.dumps(record) + "\n" for record in kept))
        with self._for_tensorboard():
            self.tensorboard = SummaryWriter(str(run.tensorboard), purge_step=first_step + 1)

    def write_metrics(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, and its numbers to TensorBoard."""
        self._append(self.run.metrics_file, record)
        with self._for_tensorboard():
            for name, value in record.items():
                if name != "step":
                    self.tensorboard.add_scalar(f"train/{name}", value, record["step"])

    def write_evaluation(self, record: dict[str, Any], grid: np.ndarray) -> None:
        """Add a line to evaluations.jsonl, and its numbers and the sample `grid` (H, W, 3) uint8 to TensorBoard."""
        self._append(self.run.evaluations_file, record)
        with self._for_tensorboard():
            if "value" in record:
                self.tensorboard.add_scalar(f"evaluation/{record['metric']}", record["value"], record["step"])
            self.tensorboard.add_image("samples", grid, record["step"], dataformats="HWC")
            self.tensorboard.flush()

    def write_look(self, record: dict[str, Any], sheet: np.ndarray, group: str) -> None:
        """Add a line to evaluations.jsonl; its `scores`, {name: {"mean": ...}}, go to the curves of `group` in
        TensorBoard, and the contact `sheet` (H, W, 3) uint8 beside them."""
        self._append(self.run.evaluations_file, record)
        with self._for_tensorboard():
            for name, score in record["scores"].items():
                self.tensorboard.add_scalar(f"{group}/{name}", score["mean"], record["step"])
            self.tensorboard.add_image("sheet", sheet, record["step"], dataformats="HWC")
            self.tensorboard.flush()

    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations so far."""
        return read_jsonl(self.run.evaluations_file)

    def __enter__(self) -> RunLog:
        # TensorBoard writes in a thread, whose errors are raised again where it is told to write next, or to close.
        self._excepthook = threading.excepthook
        threading.excepthook = lambda error: None if error.exc_type is OSError else self._excepthook(error)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._for_tensorboard():
                self.tensorboard.close()
        except UserError:
            if kind is None:
                raise
        finally:
            threading.excepthook = self._excepthook

    @contextlib.contextmanager
    def _for_tensorboard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"could not write {self.run.tensorboard}: {error.strerror}") from error

    @staticmethod
    def _append(file: Path, record: dict[str, Any]) -> None:
        try:
            with file.open("a") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"could not write {file}: {error.strerror}") from error
