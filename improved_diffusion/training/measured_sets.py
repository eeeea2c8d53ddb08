"""The sets of images that a command compares, opened or generated, with their features extracted."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from improved_diffusion.errors import UserError
from improved_diffusion.metrics.extractor import FeatureExtractor
from improved_diffusion.metrics.features import Features
from improved_diffusion.metrics.fid import Side
from improved_diffusion.metrics.measure import ImageSets, balanced_subset, feature_sizes
from improved_diffusion.metrics.opening import open_source
from improved_diffusion.metrics.sources import Source
from improved_diffusion.metrics.statistics import FeatureStatistics
from improved_diffusion.metrics.store import extract_features
from improved_diffusion.training.devices import Processes
from improved_diffusion.training.run_source import open_side


@dataclass(frozen=True)
class MeasuredSets:
    """Features of what is compared, and where the images themselves are."""

    sets: ImageSets
    features: int
    device: torch.device
    fake_source: Source | FeatureStatistics
    train_source: Source | None


def open_sets(options: argparse.Namespace, processes: Processes) -> MeasuredSets:
    """What the options of `fid.py` name. The processes share the extraction.

    Raises:
        UserError: nothing usable at a path, or what `extract_features` raises.
    """
    device = processes.device if options.device is None else usable_device(options.device)
    of_runs = {"per_class": options.per_class, "checkpoint": options.checkpoint}
    real = open_side(options.real, options.fake, device, **of_runs)
    fake = open_side(options.fake, options.real, device, **of_runs)
    train = open_source(options.train) if options.train else None
    sizes = feature_sizes(options.metrics, options.features) | (
        {options.features} if options.save_statistics else set()
    )
    extractor = FeatureExtractor(
        sizes, device, options.weights, options.preprocessing, "bf16" if options.fast else "float32"
    )

    def features_of(side: Source | FeatureStatistics) -> dict[int, Side]:
        if isinstance(side, FeatureStatistics):
            return dict.fromkeys(sizes, side)  # what does not fit is refused when it is compared
        features = extract_features(side, extractor, options.batch_size, processes)
        return features if options.n is None else _subsets(features, options.n, options.seed)

    sets = ImageSets(features_of(real), features_of(fake), None if train is None else features_of(train))
    return MeasuredSets(sets, options.features, device, fake, train)


def _subsets(features: dict[int, Features], n: int, seed: int) -> dict[int, Features]:
    return {size: balanced_subset(of_size, n, seed) for size, of_size in features.items()}


def usable_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        UserError: it cannot be used here.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return torch.device(name)
