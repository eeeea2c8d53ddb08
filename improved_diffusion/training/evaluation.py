"""The periodic evaluation of a run: a sample grid with fixed seeds, and the FID of the moving average."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from improved_diffusion.config import Config
from improved_diffusion.data.image_set import ImageSet, is_image_set, open_image_set
from improved_diffusion.data.shards import ShardedSet
from improved_diffusion.errors import UserError
from improved_diffusion.metrics import (
    FeatureExtractor,
    Features,
    frechet_inception_distance,
    metric_name,
    reference_statistics,
)
from improved_diffusion.metrics.estimate import bootstrap_interval
from improved_diffusion.metrics.features import finite
from improved_diffusion.metrics.images.opening import image_set_source
from improved_diffusion.models.build import build_sampling_denoiser
from improved_diffusion.progress import progress
from improved_diffusion.runtime.devices import Processes, arithmetic, with_autocast
from improved_diffusion.sampling.generate import SampleKey, batch_size_on, generate, sampling_record
from improved_diffusion.sampling.grids import make_grid

SPLITS_BESIDE = ("val", "test")  # sets inside the folder of the training set, in order of preference


def reference_set(config: Config, image_set: ImageSet | ShardedSet) -> ImageSet:
    """What generated images are compared with: `evaluation.reference`, or else the val or test split in the training
    set's folder, or else the training set itself, which cannot be in shards then.

    The best checkpoint is chosen by this comparison: hence val before test, which is left for the last word.

    Raises:
        UserError: it is no image set, or has other classes than the training set.
    """
    named, folder = config.evaluation.reference, Path(image_set.path)
    beside = [folder / split for split in SPLITS_BESIDE if is_image_set(folder / split)]
    if named is not None:
        reference = open_image_set(folder / named if named in SPLITS_BESIDE else named)
    elif beside:
        reference = open_image_set(beside[0])
    elif isinstance(image_set, ImageSet):
        reference = image_set
    else:
        raise UserError(
            f"there is no val or test set in {image_set.path}: name a packed set to compare with, "
            "--evaluation.reference DIR, or train without FID, --evaluation.features null"
        )
    if reference.class_names != image_set.class_names:
        raise UserError(f"the classes of {reference.path} are not those of the training set {image_set.path}")
    return reference


class Evaluator:
    """Evaluates a network against a reference set, sharing the work among the processes.

    Without classes there is one row of images, and `samples_per_class` is the number of all of them.

    The Inception weights and the reference's statistics are found when it is made, so that a run without them stops at
    its start and not at its first evaluation. `protocol` is what every record says of how it was measured (see
    `series.PROTOCOL`).

    Raises:
        UserError: no Inception weights, or the reference cannot be opened.
    """

    def __init__(self, config: Config, image_set: ImageSet | ShardedSet, processes: Processes):
        self.config = config
        self.processes = processes
        self.class_names = image_set.class_names
        self.rows = len(self.class_names) if config.model.class_conditional else 1
        # On a CPU compiled drawing is no faster; on a GPU every evaluation has the graph of the first.
        self.compiles = config.training.compile and processes.device.type == "cuda"
        if config.evaluation.features is not None:
            self.reference = reference_set(config, image_set)
        if processes.is_first:  # fills the caches for the others
            self._prepare()
        processes.wait()
        if not processes.is_first:
            self._prepare()

    def _prepare(self) -> None:
        evaluation = self.config.evaluation
        self.metric = None
        self.protocol = {
            **sampling_record(self.config, self.config.sampling),
            "ema_rate": self.config.training.ema_rates[0],
            "generation_seed": evaluation.seed,
        }
        if evaluation.features is None:
            return
        if evaluation.samples_per_class * self.rows < 2:
            raise UserError("evaluation.samples_per_class must be at least 2: one image has no covariance")
        self.metric = metric_name(evaluation.features)
        try:
            self.extractor = FeatureExtractor((evaluation.features,), self.processes.device, evaluation.weights)
        except UserError as error:
            raise UserError(f"{error} (or train without FID: --evaluation.features null)") from error
        source = image_set_source(self.reference)
        self.statistics = reference_statistics(source, self.extractor)[evaluation.features]
        self.protocol |= {
            "metric": self.metric,
            "features": evaluation.features,
            "preprocessing": self.extractor.preprocessing,
            "weights_hash": self.extractor.weights_hash,
            "reference": str(self.reference.path),
            "reference_hash": source.content_hash,
            "n_real": self.statistics.n,
            "n_fake": evaluation.samples_per_class * self.rows,
        }

    def evaluate(
        self, network: nn.Module, step: int, stop_requested: Callable[[], bool]
    ) -> tuple[dict[str, Any], np.ndarray] | None:
        """Generate images of each class with fixed seeds, measure them, and show some.

        Args:
            network: with the weights to evaluate.
            step: its step, for the record.
            stop_requested: asked between batches; once it is true the evaluation is abandoned.

        Returns:
            The record for evaluations.jsonl and the grid, uint8 (H, W, 3); None if abandoned.
        """
        evaluation, started = self.config.evaluation, time.monotonic()
        generated = self._generate(network, step, stop_requested)
        if generated is None:
            return None
        shown, features = generated
        record = {"step": step, **self.protocol}
        if features is not None:
            estimate = frechet_inception_distance(self.statistics, features)
            low, high = bootstrap_interval(estimate)
            record |= {"value": estimate.value, "low": low, "high": high}  # of the 95 % interval, the reference fixed
        record["seconds"] = round(time.monotonic() - started, 1)
        rows = [
            [shown[SampleKey(evaluation.seed, class_index, number)] for number in range(evaluation.grid_columns)]
            for class_index in range(self.rows)
        ]
        titles = self.class_names if self.config.model.class_conditional else None
        return record, make_grid(np.array(rows), titles)

    def _generate(
        self, network: nn.Module, step: int, stop_requested: Callable[[], bool]
    ) -> tuple[dict[SampleKey, np.ndarray], Features | None] | None:
        """The images of the grid, and the features of all; each process makes its share of them."""
        config, processes, evaluation = self.config, self.processes, self.config.evaluation
        device, size = processes.device, evaluation.features
        network = torch.compile(network.eval(), dynamic=False) if self.compiles else network.eval()
        run = with_autocast(network, device, arithmetic(config.training.precision, device))
        denoiser = build_sampling_denoiser(config, config.sampling, run, len(self.class_names))
        counted = evaluation.samples_per_class if size else 0
        keys = [
            SampleKey(evaluation.seed, class_index, number)
            for number in range(max(counted, evaluation.grid_columns))
            for class_index in range(self.rows)
        ]
        share = keys[processes.rank :: processes.world_size]
        # All processes must ask together whether to stop, and some have one batch more than others.
        batches_of_all = math.ceil(len(keys) // processes.world_size / batch_size_on(device, config.sampling))
        shown: dict[SampleKey, np.ndarray] = {}
        measured: dict[SampleKey, np.ndarray] = {}
        with progress(
            total=len(share), desc=f"evaluating step {step}", unit="image", leave=False, disable=not processes.is_first
        ) as bar:
            for index, (batch, images) in enumerate(generate(denoiser, share, config, config.sampling, device)):
                if index < batches_of_all and processes.any(stop_requested()):
                    return None
                counting = [key for key in batch if key.number < counted]
                if counting:
                    rows = self.extractor(images[[key.number < counted for key in batch]])[size]
                    measured |= zip(counting, finite(rows, f"the samples of step {step}"), strict=True)
                pictures = zip(batch, images.cpu().numpy(), strict=True)
                shown |= {key: picture for key, picture in pictures if key.number < evaluation.grid_columns}
                bar.update(len(batch))
        (shown, measured), *others = processes.gather((shown, measured))
        for other_shown, other_measured in others:
            shown |= other_shown
            measured |= other_measured
        if not measured:
            return shown, None
        array = np.stack([measured[key] for key in sorted(measured)])
        labels = np.array([key.class_index for key in sorted(measured)])
        return shown, Features(f"the samples of step {step}", array, self.extractor.settings(size), labels)
