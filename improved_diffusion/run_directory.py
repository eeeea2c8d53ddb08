"""The run directory: where everything of one run lies.

config.yaml  metrics.jsonl  evaluations.jsonl  tensorboard/  samples/  curves.png
checkpoints/step_0015000.pt ...; `latest` and `best` are text files that name one of them
averages/step_0015000.pt ..., with training.ema_lengths
.lock, which the process that trains holds
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import yaml

from improved_diffusion.checkpoint_file import write_checkpoint
from improved_diffusion.config import Config
from improved_diffusion.config_file import load_config
from improved_diffusion.errors import UserError
from improved_diffusion.files import exclusive, write_text
from improved_diffusion.settings import Settings, load_settings, to_plain

CHECKPOINT_NAME = re.compile(r"step_(\d{7,})\.pt")


@dataclass(frozen=True)
class RunDirectory:
    """Paths and checkpoints of the run at `path`."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations_file(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def curves_file(self) -> Path:
        return self.path / "curves.png"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def averages(self) -> Path:
        return self.path / "averages"

    @contextlib.contextmanager
    def held(self) -> Iterator[RunDirectory]:
        """Keep other processes from training here while the block lasts. The directory is made if it is not there, and
        removed at the end if nothing was written.

        Raises:
            UserError: another process holds it, or it cannot be made.
        """
        lock_file = self.path / ".lock"
        with exclusive(lock_file, f"another process trains in {self.path}: wait for its end, or give another --out"):
            try:
                yield self
            finally:
                with contextlib.suppress(OSError):
                    if list(self.path.iterdir()) == [lock_file]:
                        lock_file.unlink()
                        self.path.rmdir()

    def write_config(self, config: Any, provenance: list[dict[str, Any]]) -> None:
        """Write the resolved settings, with `provenance` (command lines, versions, commit, data) beside them."""
        write_text(self.config_file, yaml.safe_dump({**to_plain(config), "provenance": provenance}, sort_keys=False))

    def read_provenance(self) -> list[dict[str, Any]]:
        """What `write_config` wrote beside the settings; empty where there is nothing."""
        if not self.config_file.is_file():
            return []
        entries = (yaml.safe_load(self.config_file.read_text()) or {}).get("provenance")
        return entries if isinstance(entries, list) else []

    @overload
    def read_config(self) -> Config: ...

    @overload
    def read_config(self, kind: type[Settings]) -> Settings: ...

    def read_config(self, kind: type[Any] = Config) -> Any:
        """The resolved settings of the run, one of the pixel job by default.

        Raises:
            UserError: `path` is not a run directory, or its config is damaged.
        """
        if not self.path.is_dir():
            raise UserError(f"no run directory at {self.path}: train one first, or look at the spelling")
        if not self.config_file.is_file():
            raise UserError(f"{self.path} is not a run directory: it has no config.yaml")
        return load_config(self.config_file) if kind is Config else load_settings(kind, self.config_file)

    def checkpoint_file(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:07d}.pt"

    def checkpoint_files(self) -> list[Path]:
        """All the checkpoints, oldest first."""
        return _files_of_steps(self.checkpoints)

    def save_averages(self, state: dict[str, Any]) -> None:
        """Keep the power-function averages `state`, which has a `step`, for good."""
        write_checkpoint(self.averages / self.checkpoint_file(state["step"]).name, state)

    def averages_until(self, step: int) -> list[Path]:
        """All the power-function averages that were kept up to `step`, oldest first."""
        return [file for file in _files_of_steps(self.averages) if step_of(file) <= step]

    def save_checkpoint(self, state: dict[str, Any], keep: int, spared: Collection[int] = ()) -> Path:
        """Write `state` (which has a `step`), point `latest` at it, and `prune`."""
        file = self.checkpoint_file(state["step"])
        write_checkpoint(file, state)
        self.point("latest", file)
        self.prune(keep, spared)
        return file

    def prune(self, keep: int, spared: Collection[int] = ()) -> None:
        """Drop all checkpoints before the latest but the `keep` newest, the best, and those of the `spared` steps."""
        best, latest = self.pointed("best"), self.latest_checkpoint()
        for old in self.checkpoint_files()[:-keep]:
            if old != best and step_of(old) < step_of(latest) and step_of(old) not in spared:
                old.unlink()

    def turn_to(self, step: int) -> None:
        """Let the run stand at `step`: a new run at 0, a resumed one at its checkpoint, the latest or an earlier one.

        `latest` moves first, in one rename, and it decides: what lies after it, of `best` and of the records, is of no
        account from then on, so that a kill at any moment leaves the run where it was, or where it is to be. What was
        saved of later steps is removed then: the run may reach them by another way, at other learning rates.
        """
        if self.checkpoint_file(step).is_file():
            self.point("latest", self.checkpoint_file(step))
        if self.pointed("best") is None:
            (self.checkpoints / "best").unlink(missing_ok=True)
        for file in (*self.checkpoint_files(), *_files_of_steps(self.averages)):
            if step_of(file) > step:
                file.unlink()

    def discard(self, step: int) -> None:
        """Remove the checkpoint of `step`, if there is one, and let `latest` name the one before it."""
        self.checkpoint_file(step).unlink(missing_ok=True)
        if earlier := [file for file in self.checkpoint_files() if step_of(file) < step]:
            self.point("latest", earlier[-1])

    def remove_leftovers(self) -> None:
        """Remove what a kill in the middle of a save left of it."""
        for folder in (self.checkpoints, self.averages):
            for file in folder.glob(".step_*.tmp"):
                file.unlink()

    def point(self, name: str, file: Path) -> None:
        """Let `name` (`latest` or `best`) name the checkpoint `file`."""
        write_text(self.checkpoints / name, file.name + "\n")

    def pointed(self, name: str) -> Path | None:
        """The checkpoint that `name` names; None if there is no such pointer, if the file has gone, or if the run was
        turned back to a checkpoint before that one."""
        pointer = self.checkpoints / name
        text = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
        file = self.checkpoints / text
        if not CHECKPOINT_NAME.fullmatch(text) or not file.is_file():
            return None
        return file if name == "latest" or step_of(file) <= step_of(self.latest_checkpoint()) else None

    def latest_checkpoint(self) -> Path:
        """The newest checkpoint.

        Raises:
            UserError: there is none.
        """
        file = self.pointed("latest") or next(reversed(self.checkpoint_files()), None)
        if file is None:
            raise UserError(f"{self.path} has no checkpoints: nothing was saved there yet")
        return file

    def choose_checkpoint(self, name: str | None = None) -> Path:
        """The checkpoint `name`: best, latest, or a file's name; by default the best one, or else the latest.

        Raises:
            UserError: there is none.
        """
        if name is None:
            return self.pointed("best") or self.latest_checkpoint()
        if name not in ("best", "latest"):
            return self.checkpoints / name
        file = self.pointed(name)
        if file is None:
            raise UserError(f"{self.path} has no {name} checkpoint yet")
        return file


def _files_of_steps(folder: Path) -> list[Path]:
    return sorted((file for file in folder.glob("step_*.pt") if CHECKPOINT_NAME.fullmatch(file.name)), key=step_of)


def step_of(file: Path) -> int:
    """The step of a checkpoint, by its name."""
    match = CHECKPOINT_NAME.fullmatch(file.name)
    assert match is not None
    return int(match.group(1))


def is_run_directory(path: Path | str) -> bool:
    """Whether `path` is a directory with a config and checkpoints."""
    return (Path(path) / "config.yaml").is_file() and (Path(path) / "checkpoints").is_dir()
