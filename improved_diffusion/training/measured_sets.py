"""The sets of images that a command compares, opened or generated, with their features extracted."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from improved_diffusion.errors import UserError
from improved_diffusion.metrics.images.opening import open_source
from improved_diffusion.metrics.images.sources import Source, balanced_rows
from improved_diffusion.metrics.inception.extractor import FeatureExtractor
from improved_diffusion.metrics.measure import OF_TRAINING_IMAGES, ImageSets, feature_sizes
from improved_diffusion.metrics.statistics import FeatureStatistics
from improved_diffusion.metrics.store import extract_features
from improved_diffusion.training.devices import Processes, usable_device
from improved_diffusion.training.identity import Identity, identify, warn_of_selection
from improved_diffusion.training.run_source import RunImages, open_side


@dataclass(frozen=True)
class MeasuredSets:
    """Features of what is compared, and where the images themselves are."""

    sets: ImageSets
    features: int
    device: torch.device
    identities: dict[str, Identity]  # of `real`, `fake` and `train`, before --n; for the first process alone
    fake_source: Source | FeatureStatistics
    train_source: Source | None = None


def open_sets(options: argparse.Namespace, processes: Processes) -> MeasuredSets:
    """What the options of `fid.py` name. The processes share the extraction.

    Raises:
        UserError: nothing usable at a path, or what `extract_features` raises.
    """
    device = processes.device if options.device is None else usable_device(options.device)
    of_runs = RunImages(options.per_class, options.checkpoint, options.ema, options.generation_seed)
    sides = [open_side(options.real, options.fake, device, of_runs)]
    sides.append(open_side(options.fake, options.real, device, of_runs))
    needs_train = options.train and set(options.metrics) & set(OF_TRAINING_IMAGES)
    trained_on = [open_source(options.train)] if needs_train else []
    identities = {}
    if processes.is_first:
        identities = dict(zip(("real", "fake", "train"), map(identify, [*sides, *trained_on]), strict=False))
        warn_of_selection(identities["real"], identities["fake"])
    if options.n is not None:
        sides = [_subset(side, options.n, options.seed) for side in sides]
    sides += trained_on
    sizes = feature_sizes(options.metrics, options.features) | (
        {options.features} if options.save_statistics else set()
    )
    extractor = FeatureExtractor(
        sizes, device, options.weights, options.preprocessing, "bf16" if options.fast else "float32"
    )
    features = [
        # Statistics of a size that does not fit are refused when they are compared.
        dict.fromkeys(sizes, side)
        if isinstance(side, FeatureStatistics)
        else extract_features(side, extractor, options.batch_size, processes)
        for side in sides
    ]
    return MeasuredSets(ImageSets(*features), options.features, device, identities, *sides[1:])


def _subset(side: Source | FeatureStatistics, n: int, seed: int) -> Source:
    if isinstance(side, FeatureStatistics):
        raise UserError(f"--n draws images, and {side.name} holds only their mean and covariance")
    return side.subset(balanced_rows(len(side), side.labels, n, seed))
