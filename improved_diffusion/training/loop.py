"""The training loop: step, log, save, evaluate, until the last step or until someone asks it to stop."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import time
from types import FrameType

import torch
from tqdm import tqdm

from improved_diffusion.data.image_set import ImageSet
from improved_diffusion.data.shards import ShardedSet
from improved_diffusion.errors import UserError
from improved_diffusion.models.build import swapped_weights
from improved_diffusion.progress import progress
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.sampling.grids import save_png
from improved_diffusion.sampling.series import current_series, difference, protocol
from improved_diffusion.training.curves import draw_curves
from improved_diffusion.training.evaluation import Evaluator
from improved_diffusion.training.flops import flops_per_image, peak_tflops
from improved_diffusion.training.optimization import learning_rate
from improved_diffusion.training.run_log import RunLog
from improved_diffusion.training.trainer import Trainer

# Several processes must agree to stop at the same step. They ask each other after so many steps, or sooner where steps
# are slow: torchrun kills what has not ended 30 seconds after its signal.
STEPS_BETWEEN_STOP_CHECKS, SECONDS_BETWEEN_STOP_CHECKS = 10, 5.0


class StopRequest:
    """Within its block, turns SIGINT, SIGTERM and, but for nohup, SIGHUP (a terminal was closed) into a wish to stop.
    Whoever signals twice may not know that a step or its saving is under way (torchrun passes on a Ctrl-C that its
    processes got themselves): the second one only says so, and the third one interrupts at once."""

    def __init__(self) -> None:
        self.signals = 0

    @property
    def requested(self) -> bool:
        return self.signals > 0

    def __enter__(self) -> StopRequest:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._handlers = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1
        if self.signals == 2:  # print could be interrupted in the middle of itself
            os.write(2, b"\nstopping as soon as all is saved; once more interrupts at once\n")
        if self.signals > 2:
            raise KeyboardInterrupt


class TrainingLoop:
    """A run: a trainer, what evaluates it, and the directory that records it.

    Args:
        trainer: new, or with the state of a checkpoint loaded.
        evaluator: of its moving average.
        run: where everything is written, by the first process alone.
        image_set: what it trains on; its hash and class names go into the checkpoints.
    """

    def __init__(self, trainer: Trainer, evaluator: Evaluator, run: RunDirectory, image_set: ImageSet | ShardedSet):
        self.trainer = trainer
        self.evaluator = evaluator
        self.run = run
        self.image_set = image_set
        self.config = trainer.config
        self.processes = trainer.processes
        self.log = RunLog(run, trainer.step) if self.processes.is_first else contextlib.nullcontext()
        evaluations = self.processes.gather(self.log.evaluations() if self.processes.is_first else [])[0]
        self.evaluated_steps = {record["step"] for record in evaluations}
        series = current_series(evaluations, evaluator.protocol)
        if evaluations and not series and self.processes.is_first:
            what = difference(evaluations[-1], protocol(evaluator.protocol))
            print(f"evaluation: a new series, not compared with the one before, for its protocol differs: {what}")
        # Of a run that was turned back the best checkpoint until then may have been removed.
        scored = {record["step"]: record["value"] for record in series if "value" in record}
        comparable = {step: value for step, value in scored.items() if run.checkpoint_file(step).is_file()}
        self.best_value = min(comparable.values(), default=math.inf)
        if self.processes.is_first and comparable and run.pointed("best") is None:
            run.point("best", run.checkpoint_file(min(comparable, key=comparable.__getitem__)))
        self.saved_step = trainer.step  # of the newest checkpoint; 0 for none
        self.peak = peak_tflops(self.processes.device, trainer.dtype)
        self.logged_step, self.logged_time = trainer.step, time.monotonic()
        self.stop = StopRequest()
        self.stop_check_step, self.stop_check_time = trainer.step, time.monotonic()
        self.next_stop_check = trainer.step + 1

    def train(self) -> bool:
        """Train to the last step. Returns False if a signal stopped it before that; all is saved either way.

        Raises:
            UserError: a loss that is not finite; the message names the last good checkpoint.
        """
        trainer, training = self.trainer, self.config.training
        batches = trainer.stream.batches(trainer.step)
        shown = {"total": training.steps, "initial": trainer.step, "desc": "training", "unit": "step"}
        with self.stop, self.log, progress(**shown, disable=not self.processes.is_first) as bar:
            while not self._is_finished():
                if self._evaluation_is_due():
                    self._save()
                    self._evaluate()
                else:
                    trainer.train_step(*next(batches))
                    bar.update()
                    if self._is_due(training.log_every):
                        bar.set_postfix(self._log_metrics(), refresh=False)
                    if self._is_due(training.save_every):
                        self._save()
                if self._should_stop():
                    self._save()
                    break
        return self._is_finished()

    def _is_finished(self) -> bool:
        return self.trainer.step >= self.config.training.steps and not self._evaluation_is_due()

    def _is_due(self, every: int) -> bool:
        return self.trainer.step % every == 0 or self.trainer.step == self.config.training.steps

    def _evaluation_is_due(self) -> bool:
        step = self.trainer.step
        return step > 0 and step not in self.evaluated_steps and self._is_due(self.config.evaluation.every)

    def _should_stop(self) -> bool:
        if self.processes.world_size == 1:
            return self.stop.requested
        if self.trainer.step < self.next_stop_check and not self._evaluation_is_due():
            return False
        self._plan_next_stop_check()
        return self.processes.any(self.stop.requested)

    def _plan_next_stop_check(self) -> None:
        step, now = self.trainer.step, time.monotonic()
        per_step = (now - self.stop_check_time) / max(1, step - self.stop_check_step)
        steps = max(1, min(STEPS_BETWEEN_STOP_CHECKS, int(SECONDS_BETWEEN_STOP_CHECKS / per_step)))
        agreed = self.processes.broadcast(torch.tensor(steps, device=self.processes.device), source=0)
        self.stop_check_step, self.stop_check_time, self.next_stop_check = step, now, step + int(agreed)

    def _log_metrics(self) -> dict[str, str]:
        """Write a line of metrics.jsonl; returns what the progress bar shows of it."""
        self._require_finite()
        trainer, training, now = self.trainer, self.config.training, time.monotonic()
        means = trainer.terms.flush(self.processes)
        images = (trainer.step - self.logged_step) * training.batch_size
        rate = images / (now - self.logged_time)
        record = {
            "step": trainer.step,
            "images_seen": trainer.step * training.batch_size,
            **means,
            "lr": learning_rate(training, trainer.step - 1),  # of the last step
            "images_per_second": rate,
        }
        if self.processes.is_first:
            record |= self._utilisation(rate)
            self.log.write_metrics(record)
        self.logged_step, self.logged_time = trainer.step, time.monotonic()  # the rate leaves out the log
        shown = ("loss", "mse", "mfu" if "mfu" in record else "tflops")
        return {name: f"{record[name]:.4g}" for name in shown if name in record}

    @functools.cached_property
    def _flops_per_image(self) -> int:
        return flops_per_image(self.trainer.network, self.config.model)

    def _utilisation(self, images_per_second: float) -> dict[str, float]:
        """The arithmetic of the network: of an image, per second in all processes, and as a share of what their devices
        could do (model FLOP utilisation: Chowdhery et al. 2022, arXiv:2204.02311, appendix B), where that is known."""
        tflops = self._flops_per_image * images_per_second / 1e12
        share = {} if self.peak is None else {"mfu": tflops / (self.peak * self.processes.world_size)}
        return {"flops_per_image": self._flops_per_image, "tflops": tflops, **share}

    def _require_finite(self) -> None:
        if not self.trainer.terms.are_finite(self.processes):
            if self.saved_step:
                saved = self.run.checkpoint_file(self.saved_step)
                advice = f"go on from the last good one, --resume {saved}, with a lower --training.lr, or a tighter"
            else:
                advice = "no checkpoint had been saved: begin anew with a lower --training.lr, or a tighter"
            where = f"between steps {self.logged_step} and {self.trainer.step}"
            raise UserError(f"the loss or its gradient was not finite {where}; {advice} --training.grad_clip")

    def _save(self) -> None:
        """Save a checkpoint of this step, unless there is one."""
        trainer, step = self.trainer, self.trainer.step
        if step == self.saved_step:
            return
        self._require_finite()
        state = {
            **trainer.state_dict(),
            "class_names": list(self.image_set.class_names),
            "data_hash": self.image_set.content_hash,
        }
        keeps_averages = self.config.training.ema_lengths and self._is_due(self.config.training.save_every)
        averages = trainer.averages_to_keep() if keeps_averages else None
        if self.processes.is_first:
            if averages is not None:
                self.run.save_averages(averages)
            self.run.save_checkpoint(state, self.config.training.keep_checkpoints)
        self.saved_step = step

    def _evaluate(self) -> None:
        """Evaluate the checkpoint of this step, and draw the curves. A stop request leaves it for the resumed run."""
        trainer, started = self.trainer, time.monotonic()
        rate = self.config.training.ema_rates[0]
        average = trainer.division.in_all(trainer.ema.weights(rate))
        with swapped_weights(dict(trainer.network.named_parameters()), average):
            result = self.evaluator.evaluate(trainer.network, trainer.step, lambda: self.stop.requested)
        self.logged_time += time.monotonic() - started  # the rate of training leaves evaluations out
        if result is None:
            return
        record, grid = result
        self.evaluated_steps.add(trainer.step)
        value = record.get("value", math.inf)
        is_best = value < self.best_value
        self.best_value = min(value, self.best_value)
        if not self.processes.is_first:
            return
        # The record comes after what it stands for: a kill in between only repeats the evaluation.
        if is_best:
            self.run.point("best", self.run.checkpoint_file(trainer.step))
            self.run.prune(self.config.training.keep_checkpoints)
        save_png(grid, self.run.samples / f"step_{trainer.step:07d}.png")
        self.log.write_evaluation(record, grid)
        draw_curves(self.run)
        if "value" in record:
            tqdm.write(f"step {trainer.step}: {record['metric']} {value:.4g}{' (best)' if is_best else ''}")
