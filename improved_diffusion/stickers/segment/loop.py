"""The loop: an update, a log, a look, a checkpoint, until the last update or until someone asks it to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from improved_diffusion.errors import UserError
from improved_diffusion.models.build import swapped_weights
from improved_diffusion.progress import progress
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.sampling.grids import save_png
from improved_diffusion.stickers.segment.drawing import TrainingPictures
from improved_diffusion.stickers.segment.models import CutoutNetwork, learned
from improved_diffusion.stickers.segment.trainer import Trainer
from improved_diffusion.training.loop import StopRequest
from improved_diffusion.training.optimization import learning_rate
from improved_diffusion.training.run_log import RunLog

Look = Callable[[CutoutNetwork], tuple[dict[str, Any], np.ndarray]]  # at held-out pictures: a record, and a sheet


class SegmentLoop:
    """A run: a trainer, the pictures, and the directory that records it.

    Args:
        trainer: new, or with the state of a checkpoint loaded.
        pictures: to train on.
        data_hash: of their set, which a resumed run must find again.
        look: at what the moving average cuts out.
        run: where everything is written.
    """

    def __init__(self, trainer: Trainer, pictures: TrainingPictures, data_hash: str, look: Look, run: RunDirectory):
        self.trainer, self.pictures, self.data_hash, self.look, self.run = trainer, pictures, data_hash, look, run
        self.training = trainer.config.training
        self.log = RunLog(run, trainer.step)
        self.looked_at = {record["step"] for record in self.log.evaluations()}
        self.saved_step = trainer.step
        self.logged_step, self.logged_seconds = trainer.step, trainer.seconds
        self.stop = StopRequest()

    def train(self) -> bool:
        """Train to the last update. Returns False if a signal stopped it before that; all is saved either way.

        Raises:
            UserError: a loss that is not finite; the message names the last good checkpoint.
        """
        trainer, training = self.trainer, self.training
        batches = self._batches()
        shown = {"total": training.steps, "initial": trainer.step, "desc": "training", "unit": "step"}
        with self.stop, self.log, progress(**shown) as bar:
            while trainer.step < training.steps or self._look_is_due():
                if self._look_is_due():
                    self._save()
                    self._look_and_record()
                else:
                    started = time.monotonic()
                    trainer.train_step(*next(batches))
                    trainer.seconds += time.monotonic() - started
                    bar.update()
                    if self._is_due(training.log_every):
                        bar.set_postfix(self._log_metrics(), refresh=False)
                    if self._is_due(training.save_every):
                        self._save()
                if self.stop.requested:  # a look that is due is left to the resumed run
                    self._save()
                    return False
        return True

    def _batches(self) -> Iterator[list[Tensor]]:
        """Those from `trainer.step` on."""
        workers, size = self.training.workers, self.training.batch_size
        return iter(
            torch.utils.data.DataLoader(
                self.pictures,
                size,
                sampler=range(self.trainer.step * size, self.training.steps * size),
                num_workers=workers,
                # Forked processes would share the place in a zip file, and can deadlock.
                multiprocessing_context="spawn" if workers else None,
            )
        )

    def _is_due(self, every: int) -> bool:
        step = self.trainer.step
        return step > 0 and (step % every == 0 or step == self.training.steps)

    def _log_metrics(self) -> dict[str, str]:
        """Write a line of metrics.jsonl; returns what the progress bar shows of it."""
        self._require_finite()
        trainer, size = self.trainer, self.training.batch_size
        means = trainer.means.flush()
        record = {
            "step": trainer.step,
            "images_seen": trainer.step * size,
            **means,
            "lr": learning_rate(self.training, trainer.step - 1),
            "images_per_second": (trainer.step - self.logged_step) * size / (trainer.seconds - self.logged_seconds),
        }
        self.log.write_metrics(record)
        self.logged_step, self.logged_seconds = trainer.step, trainer.seconds
        return {"loss": f"{means['loss']:.4g}"}

    def _require_finite(self) -> None:
        if not all(torch.isfinite(total) for total in self.trainer.means.sums.values()):
            saved = f"the last checkpoint is that of step {self.saved_step}" if self.saved_step else "nothing was saved"
            raise UserError(f"the loss or its gradient is not finite; {saved}: use a lower training.lr")

    def _save(self) -> None:
        """Save a checkpoint of this step, unless there is one."""
        if self.trainer.step != self.saved_step:
            self._require_finite()
            state = {**self.trainer.state_dict(), "data_hash": self.data_hash}
            self.run.save_checkpoint(state, self.training.keep_checkpoints)
            self.saved_step = self.trainer.step

    def _look_is_due(self) -> bool:
        return self._is_due(self.training.evaluate_every) and self.trainer.step not in self.looked_at

    def _look_and_record(self) -> None:
        trainer, step = self.trainer, self.trainer.step
        with swapped_weights(learned(trainer.network), trainer.ema.weights(self.training.ema_rate)):
            record, sheet = self.look(trainer.network)
        save_png(sheet, self.run.samples / f"step_{step:07d}.png")
        self.log.write_evaluation({"step": step, "seconds": trainer.seconds, **record}, sheet)
        self.looked_at.add(step)
