"""The loop: an update, a log, a look, a checkpoint, until the last update or until someone asks it to stop."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from improved_diffusion.errors import UserError
from improved_diffusion.models.build import swapped_weights
from improved_diffusion.personalize.config import PersonalizeConfig
from improved_diffusion.personalize.generate import BrokenPicture
from improved_diffusion.personalize.measuring.choice import Look, candidates, choose, overfitting
from improved_diffusion.personalize.training.budget import Budget
from improved_diffusion.personalize.training.trainer import EncodedSet, Trainer
from improved_diffusion.personalize.training.watch import Watch, fixed_loss, series_of, to_look
from improved_diffusion.progress import progress
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.sampling.grids import save_png
from improved_diffusion.sampling.series import changed
from improved_diffusion.training.loop import StopRequest
from improved_diffusion.training.run_log import RunLog


class PersonalizeLoop:
    """A run: a trainer, what watches it, and the directory that records it.

    Args:
        trainer: new, or with the state of a checkpoint loaded.
        watch: of its weights; on the first process alone, None on the others and where there are no looks.
        held_out: images that it does not train on, or None.
        budget: what it is to do.
        look_every: updates between looks, or None.
        run: where everything is written, by the first process alone.
        config: of the run.
        content_hash: of the images and captions, which a resumed run must find again.
        wandb: a Weights & Biases run to log to as well, or None.
    """

    def __init__(
        self,
        trainer: Trainer,
        watch: Watch | None,
        held_out: EncodedSet | None,
        budget: Budget,
        look_every: int | None,
        run: RunDirectory,
        config: PersonalizeConfig,
        content_hash: str,
        wandb: Any = None,
    ):
        self.trainer, self.watch, self.held_out = trainer, watch, held_out
        self.budget, self.look_every, self.run, self.config = budget, look_every, run, config
        self.content_hash, self.wandb = content_hash, wandb
        self.is_first = trainer.accelerator.is_main_process
        self.log = RunLog(run, trainer.step) if self.is_first else contextlib.nullcontext()
        records = self.log.evaluations() if self.is_first else []
        self.looks = [look for record in records if (look := to_look(record)) is not None]
        self.group = self._open_series(records) if watch is not None else ""
        if self.is_first and run.pointed("best") is None:  # as after turning back to an earlier checkpoint
            self._point_best()
        now = (trainer.step, watch.protocol if watch is not None else None)
        looked_at = trainer.step if now in [(r["step"], r.get("protocol")) for r in records] else -1
        self.looked_at = broadcast_object_list([looked_at])[0]  # the others have no records, and wait for a look
        self.saved_step = trainer.step if trainer.step else -1

    def train(self, should_stop: Callable[[], bool] | None = None) -> bool:
        """Train to the last update. Returns False if it was stopped before that; all is saved either way, and to call
        this again goes on.

        Args:
            should_stop: asked before each update; by default whether SIGINT or SIGTERM came, of which only the main
                thread can be told.

        Raises:
            UserError: a loss that is not finite, or pictures of one colour.
        """
        trainer, training, updates = self.trainer, self.config.training, self.budget.total.updates
        shown = {"total": updates, "initial": trainer.step, "desc": "training", "unit": "update"}
        self.logged_images, self.logged_time = trainer.images_seen, time.monotonic()
        asked = StopRequest() if should_stop is None else contextlib.nullcontext(should_stop)
        with asked as stops, self.log, progress(**shown, disable=not self.is_first) as bar:
            self._look_if_due()
            while trainer.step < updates and not self._any_process(stops()):
                trainer.train_step()
                bar.update()
                if self._is_due(training.log_every):
                    bar.set_postfix(self._log(), refresh=False)
                if self._is_due(training.save_every) or self._is_due(self.look_every):
                    self._save()
                self._look_if_due()
            self._save()
        return trainer.step >= updates

    def _open_series(self, records: list[dict[str, Any]]) -> str:
        """What the curves of this run's looks are called; says so where they cannot be compared with the last ones."""
        protocol, known = self.watch.protocol, [record.get("protocol") for record in records]
        if known and known[-1] != protocol:
            which = "an earlier" if protocol in known else "a new"
            why = "how the earlier ones were made was not recorded"
            if known[-1] is not None:
                why = f"other {', '.join(changed(known[-1], protocol))}"
            tqdm.write(f"looks: {which} series, not compared with the last one ({why})")
        number = series_of(records, protocol)
        return "watch" if number == 1 else f"watch_{number}"

    def _is_due(self, every: int | None) -> bool:
        return every is not None and (self.trainer.step % every == 0 or self.trainer.step == self.budget.total.updates)

    def _any_process(self, says: bool) -> bool:
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return says
        said = torch.tensor(float(says), device=accelerator.device)
        return bool(accelerator.reduce(said, "sum") > 0)

    def _require_sound(self) -> None:
        """To be asked before anything of the last updates is kept."""
        if not self.trainer.is_sound():
            saved = f"the last checkpoint is of step {self.saved_step}" if self.saved_step > 0 else "nothing was saved"
            raise UserError(
                f"by update {self.trainer.step} the loss or its gradient is not finite; {saved}: use a lower "
                "training.lr, or training.precision bf16 or float32"
            )

    def _log(self) -> dict[str, str]:
        """Write a line of metrics.jsonl; returns what the progress bar shows of it."""
        self._require_sound()
        trainer, now = self.trainer, time.monotonic()
        # In fp16 a gradient may overflow, whereupon the update is left out and the scale lowered.
        means = {name: mean for name, mean in trainer.means.flush().items() if math.isfinite(mean)}
        record = {
            "step": trainer.step,
            "images_seen": trainer.images_seen,
            **means,
            **{f"lr_{part}": group["lr"] for part, group in self._groups()},
            "images_per_second": (trainer.images_seen - self.logged_images) / (now - self.logged_time),
        }
        if self.is_first:
            self.log.write_metrics(record)
            if self.wandb is not None:
                self.wandb.log({f"train/{name}": value for name, value in record.items()}, step=trainer.step)
        self.logged_images, self.logged_time = trainer.images_seen, now
        return {"loss": f"{means['loss']:.4g}"}

    def _groups(self) -> zip:
        return zip(self.trainer.trained.parts, self.trainer.optimizer.param_groups, strict=True)

    def _save(self) -> None:
        """Save a checkpoint of this step, unless there is one."""
        step = self.trainer.step
        if step == self.saved_step:
            return
        self._require_sound()
        if not self.is_first:
            return
        spared = [look.step for look in candidates(self.looks, self.config.watch.copy_cap)]
        state = {**self.trainer.state_dict(), "data_hash": self.content_hash}
        self.run.save_checkpoint(state, self.config.training.keep_checkpoints, spared)
        self.saved_step = step

    def _look_if_due(self) -> None:
        """Draw and measure, choose the best checkpoint, and warn. The other processes wait."""
        if not self._is_due(self.look_every) or self.looked_at == self.trainer.step:
            return
        self.looked_at = self.trainer.step
        if self.is_first:
            started = time.monotonic()
            self._look()
            self.logged_time += time.monotonic() - started  # the rate of training leaves looks out
        self.trainer.accelerator.wait_for_everyone()

    def _look(self) -> None:
        trainer, step = self.trainer, self.trainer.step
        trainer.rest()
        with self._averaged():
            try:
                record, sheet = self.watch.look(step)
            except BrokenPicture:
                self.run.discard(step)  # or a resumed run would begin with broken weights
                raise
            timesteps = self.config.watch.loss_timesteps
            if self.held_out is not None:
                record["held_out_loss"] = fixed_loss(trainer, self.held_out, timesteps)
        save_png(sheet, self.run.samples / f"step_{step:07d}.png")
        self.log.write_look(record, sheet, self.group)
        if self.wandb is not None:
            self._to_wandb(record, sheet)
        said = [f"{name} {score['mean']:.3f}" for name, score in record["scores"].items()]
        said += [f"held-out loss {record['held_out_loss']:.4f}"] if "held_out_loss" in record else []
        tqdm.write(f"step {step}: {', '.join(said) or 'drawn'}")
        for concept, of_concept in record.get("concepts", {}).items():
            means = (f"{name} {score['mean']:.3f}" for name, score in of_concept.items())
            tqdm.write(f"    {concept}: {', '.join(means)}")
        if (look := to_look(record)) is not None:
            self.looks.append(look)
            self._choose_and_warn()
        elif step > 0:
            self.run.point("best", self.run.checkpoint_file(step))

    def _choose_and_warn(self) -> None:
        """Point `best` at the checkpoint of the best look, and say what speaks for overfitting."""
        cap = self.config.watch.copy_cap
        best = self._point_best()
        if best is not None:
            self.run.prune(self.config.training.keep_checkpoints, [look.step for look in candidates(self.looks, cap)])
        for sign in overfitting(self.looks, cap) if self.looks[-1].step > 0 else ():
            chosen = f"the best checkpoint is that of step {best.step}" if best else "no checkpoint copies so little"
            tqdm.write(f"warning: {sign}; {chosen}")

    def _point_best(self) -> Look | None:
        """Point `best` at the checkpoint of the best look, if there is one."""
        best = choose([look for look in self.looks if self._is_there(look)], self.config.watch.copy_cap)
        if best is not None:
            self.run.point("best", self.run.checkpoint_file(best.step))
        return best

    def _is_there(self, look: Look) -> bool:
        return look.step == 0 or self.run.checkpoint_file(look.step).is_file()

    def _averaged(self) -> contextlib.AbstractContextManager:
        """Within it the moving average is what is drawn from, if there is one."""
        if self.trainer.ema is None:
            return contextlib.nullcontext()
        average = self.trainer.ema.weights(self.config.training.ema_rate)
        return swapped_weights(self.trainer.trained.parameters, average)

    def _to_wandb(self, record: dict[str, Any], sheet: Any) -> None:
        import wandb

        scalars = {f"{self.group}/{name}": score["mean"] for name, score in record["scores"].items()}
        self.wandb.log({**scalars, f"{self.group}/sheet": wandb.Image(sheet)}, step=record["step"])
