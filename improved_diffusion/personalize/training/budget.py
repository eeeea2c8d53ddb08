"""What a run will do, counted before its first step: updates, epochs, images seen, and looks."""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection
from dataclasses import dataclass

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import PersonalizeConfig, TrainingConfig
from improved_diffusion.personalize.data.stream import MicroBatchStream


@dataclass(frozen=True)
class Counters:
    """What a run has done."""

    updates: int
    images_seen: int
    prior_seen: int

    def __str__(self) -> str:
        prior = f", {self.prior_seen:,} of the prior" if self.prior_seen else ""
        return f"{self.updates:,} updates, {self.images_seen:,} images seen{prior}"


@dataclass(frozen=True)
class Budget:
    """What a run is to do, and the arithmetic of it."""

    images: int
    repeats: tuple[int, ...]  # of each image
    batch_size: int
    accumulation: int
    processes: int
    batches_per_epoch: int  # micro-batches; those that a size's images do not fill are smaller
    total: Counters

    @property
    def batches_per_update(self) -> int:
        return self.accumulation * self.processes

    @property
    def epochs(self) -> float:
        return self.total.images_seen / sum(self.repeats)

    def __str__(self) -> str:
        gpus = f" / {self.processes} processes" if self.processes > 1 else ""
        least, most = min(self.repeats), max(self.repeats)
        repeats = f"{most} repeats" if least == most else f"{least} to {most} repeats = {sum(self.repeats):,}"
        return (
            f"{self.images:,} images x {repeats} / batch {self.batch_size} = {self.batches_per_epoch:,} "
            f"batches an epoch / accumulation {self.accumulation}{gpus} = "
            f"{self.batches_per_epoch / self.batches_per_update:,.2f} updates an epoch; "
            f"in all {self.epochs:,.1f} epochs: {self.total}"
        )


def plan(
    stream: MicroBatchStream, training: TrainingConfig, processes: int, with_prior: Collection[int] = ()
) -> Budget:
    """The budget of a run over `stream`, in which beside the images `with_prior` others of their priors are seen.

    Raises:
        UserError: neither updates nor epochs are given.
    """
    batches_per_update = training.accumulation * processes
    if training.steps is not None:
        updates = training.steps
    elif training.epochs is not None:
        updates = max(1, math.ceil(training.epochs * stream.batches_per_epoch / batches_per_update))
    else:
        raise UserError("how long to train? give training.steps, in updates, or training.epochs")
    batches = updates * batches_per_update
    seen = Counters(updates, stream.images_in(batches), stream.images_in(batches, with_prior))
    return Budget(
        images=len(stream.sizes),
        repeats=stream.repeats,
        batch_size=training.batch_size,
        accumulation=training.accumulation,
        processes=processes,
        batches_per_epoch=stream.batches_per_epoch,
        total=seen,
    )


@dataclass(frozen=True)
class LookBudget:
    """How often a run is looked at, and what that costs beside its training, in evaluations of the network for one
    image: what the autoencoder and the judges do is little beside them."""

    every: int | None  # updates between looks, the first and the last apart; None: no looks
    count: int
    pictures: int  # of a look
    evaluations: int  # of all looks
    of_training: int
    allowed: float  # share

    @property
    def share(self) -> float:
        """Of the run's arithmetic."""
        return self.evaluations / (self.evaluations + self.of_training)

    def __str__(self) -> str:
        if self.every is None:
            return "none"
        too_many = f", above watch.share {self.allowed:g}: fewer watch.seeds, prompts or steps make it less"
        return (
            f"{self.count} of {self.pictures} pictures, before training and then every {self.every:,} updates: "
            f"{self.evaluations:,} evaluations of the network beside {self.of_training:,} of training, "
            f"{self.share:.0%} of the run{too_many if self.share > self.allowed else ''}"
        )


def plan_looks(config: PersonalizeConfig, total: Counters, prompts: int, held_out: int) -> LookBudget:
    """The looks at a run, as far apart as `watch.share` wants them.

    Training takes a forward pass of each image, the gradients of what the network makes of it, as much again, those of
    its weights if they are trained, as much again, and with gradient checkpointing a second forward pass.

    Args:
        config: of the run.
        total: what it is to do.
        prompts: those drawn at a look, the class's among them; `held_out`: images that the loss is measured on.
    """
    watch, updates = config.watch, total.updates
    passes = 2 + (config.method == "full") + config.training.gradient_checkpointing
    of_training = passes * (total.images_seen + total.prior_seen)
    if watch.every is None:
        return LookBudget(None, 0, 0, 0, of_training, watch.share)
    pictures = prompts * len(watch.seeds)
    of_picture = watch.steps * (2 if watch.guidance_scale > 1 else 1)
    of_look = pictures * of_picture + held_out * len(watch.loss_timesteps)

    def looks(every: int) -> LookBudget:
        count = 1 + math.ceil(updates / every)
        return LookBudget(every, count, pictures, count * of_look, of_training, watch.share)

    spacings = range(watch.every, updates, watch.every)
    fitting = (found for every in spacings if (found := looks(every)).share <= watch.share)
    return next(fitting, None) or looks(max(updates, watch.every))


def require_same_updates(stream: MicroBatchStream, budget: Budget, step: int, images_seen: int) -> None:
    """An update of a resumed run takes as many micro-batches of `stream` as its first `step` did, which saw
    `images_seen` images: what is drawn goes by their numbers.

    Raises:
        UserError: accumulation and processes make others of them.
    """
    taken = budget.batches_per_update
    if stream.images_in(step * taken) == images_seen:
        return
    before = bisect.bisect_left(range(images_seen), images_seen, key=lambda count: stream.images_in(step * count))
    fits = before % budget.processes == 0
    raise UserError(
        f"an update of this run takes {before} micro-batches, and training.accumulation {budget.accumulation} in "
        f"{budget.processes} process(es) makes {taken} of them, so that it would not go on with what comes next: "
        + (f"set training.accumulation to {before // budget.processes}" if fits else "start fewer or more processes")
    )
