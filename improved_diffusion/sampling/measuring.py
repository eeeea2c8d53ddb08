"""Measuring images against images, wherever each side's come from: files, arrays, or a model that draws them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from improved_diffusion.errors import UserError
from improved_diffusion.metrics.fid import Side
from improved_diffusion.metrics.images.opening import open_source
from improved_diffusion.metrics.images.sources import ArraySource, Source, balanced_rows
from improved_diffusion.metrics.inception.extractor import FeatureExtractor
from improved_diffusion.metrics.measure import OF_TRAINING_IMAGES, FeatureSets, Measurement, feature_sizes, measure
from improved_diffusion.metrics.statistics import FeatureStatistics, is_statistics_file
from improved_diffusion.metrics.store import extract_features
from improved_diffusion.runtime.devices import Processes, usable_device
from improved_diffusion.sampling.identity import Identity, identify, warn_of_selection
from improved_diffusion.sampling.loading import is_model, load
from improved_diffusion.sampling.model import Model, change_sampling
from improved_diffusion.sampling.run_source import run_source

Images = Path | str | np.ndarray | Model
"""A side of a comparison: what `open_source` opens, an .npz of saved statistics, uint8 images (N, H, W, 3), a model, or
what `load` loads."""


def fid(
    real: Images,
    fake: Images,
    features: int = 2048,
    *,
    n: int | None = None,
    per_class: int | None = None,
    generation_seed: int = 1,
    confidence: float = 0.95,
    preprocessing: str = "tf1",
    fast: bool = False,
    weights: Path | str | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
) -> Measurement:
    """The Fréchet inception distance of `fake` from `real`: the number that fid.py prints.

    Args:
        real: the reference: a folder, a zip, a packed set, an .npy or .npz of images, an .npz of saved statistics, an
            array of uint8 images (N, H, W, 3), or a model or its path.
        fake: what is measured; any of these too.
        features: size of the Inception features: 64, 192, 768 or 2048, which is what "FID" means elsewhere.
        n: measure with at most so many images of each side, drawn evenly over the classes if both have some.
        per_class: images of each class that a model draws, as its own settings say; by default as many as the other
            side has.
        generation_seed: of a model's images; where both sides are models, the next one for those of `real`.
        confidence: of the interval.
        preprocessing: the resize: tf1, clean or none.
        fast: features in bfloat16: another measurement, not to be mixed with others.
        weights: file of the Inception weights; by default found as fid.py finds them.
        batch_size: images per network call; by default what suits the device.
        device: cpu, cuda, cuda:1 ...; by default a GPU if there is one.

    Returns:
        The value, its interval, and what it was measured with.

    Raises:
        UserError: nothing usable on a side, no weights, or images that cannot be compared.
    """
    if n is not None and n < 2:
        raise UserError(f"n is {n}: it must be at least 2")
    if not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence}: it must lie between 0 and 1")
    drawn = Drawn(per_class=per_class, seed=generation_seed)
    extraction = Extraction(weights, preprocessing, fast, batch_size)
    opened = open_sets(
        *(real, fake, ["fid"], features),
        drawn=drawn,
        n=n,
        extraction=extraction,
        processes=Processes(usable_device(device)),
    )
    (measurement,) = opened.measure("fid", confidence)
    return measurement


@dataclass(frozen=True)
class Drawn:
    """Which images of a model are measured."""

    per_class: int | None = None
    """How many of each class; by default as many as what they are compared with has."""
    checkpoint: str | None = None
    """As for `load`."""
    ema: float | None = None
    """As for `load`."""
    seed: int = 1
    """Of the images; by default another than that of the evaluations by which a run's best was chosen."""
    guide: Model | None = None
    """By which the model is guided."""
    ema_length: float | None = None
    """As for `load`."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Of the model's own sampling settings: see `change_sampling`."""


@dataclass(frozen=True)
class Extraction:
    """How features are computed; see `FeatureExtractor`."""

    weights: Path | str | None = None
    preprocessing: str = "tf1"
    fast: bool = False
    batch_size: int | None = None


@dataclass(frozen=True)
class MeasuredSets:
    """Features of what is compared, and where the images themselves are."""

    sets: FeatureSets
    features: int
    device: torch.device
    identities: dict[str, Identity]  # of `real`, `fake` and `train`, before they are thinned to n; first process alone
    fake_source: Source | FeatureStatistics
    train_source: Source | None = None

    def measure(self, metric: str, confidence: float = 0.95, seed: int = 0) -> list[Measurement]:
        """See `improved_diffusion.metrics.measure`."""
        return measure(self.sets, [metric], self.features, self.device, confidence, seed)


def open_sets(
    real: Images,
    fake: Images,
    metrics: Sequence[str],
    features: int = 2048,
    *,
    processes: Processes,
    train: Path | None = None,
    n: int | None = None,
    seed: int = 0,
    drawn: Drawn = Drawn(),  # noqa: B008 (it is frozen)
    extraction: Extraction = Extraction(),  # noqa: B008
    always: bool = False,
) -> MeasuredSets:
    """Open both sides and extract their features; the processes share the work.

    Args:
        real: the reference.
        fake: what is measured.
        metrics: for which features are wanted.
        features: size, for the metrics that leave a choice.
        processes: with the device.
        train: what the model was trained on, for the metrics that need it.
        n: at most so many images of each side, drawn evenly over the classes.
        seed: by which these are drawn.
        drawn: which images of a model.
        extraction: how features are computed.
        always: have features of that size also where no metric wants them.

    Raises:
        UserError: nothing usable on a side, or what `extract_features` raises.
    """
    device = processes.device
    opened = [_opened(side, drawn, device) for side in (real, fake)]
    # Of two models each has noise of its own: drawn from the same, their images would not be independent, and too near.
    of_real = dataclasses.replace(drawn, seed=drawn.seed + 1) if isinstance(opened[1], Model) else drawn
    sides = [_side(opened[0], opened[1], of_real), _side(opened[1], opened[0], drawn)]
    trained_on = [open_source(train)] if train and set(metrics) & set(OF_TRAINING_IMAGES) else []
    identities: dict[str, Identity] = {}
    if processes.is_first:
        identities = dict(zip(("real", "fake", "train"), map(identify, [*sides, *trained_on]), strict=False))
        warn_of_selection(identities["real"], identities["fake"])
    if n is not None:
        evenly = all(isinstance(side, FeatureStatistics) or side.labels is not None for side in sides)
        sides = [_subset(side, n, seed, evenly) for side in sides]
    sizes = feature_sizes(metrics, features) | ({features} if always else set())
    precision = "bf16" if extraction.fast else "float32"
    extractor = FeatureExtractor(sizes, device, extraction.weights, extraction.preprocessing, precision)

    def features_of(side: Source | FeatureStatistics) -> Mapping[int, Side]:
        if isinstance(side, FeatureStatistics):  # of a size that does not fit: refused when it is compared
            return dict.fromkeys(sizes, side)
        return extract_features(side, extractor, extraction.batch_size, processes)

    trained = extract_features(trained_on[0], extractor, extraction.batch_size, processes) if trained_on else None
    sets = FeatureSets(features_of(sides[0]), features_of(sides[1]), trained)
    return MeasuredSets(sets, features, device, identities, sides[1], trained_on[0] if trained_on else None)


def _opened(side: Images, drawn: Drawn, device: torch.device) -> Source | FeatureStatistics | Model:
    if isinstance(side, Model):
        return side
    if isinstance(side, np.ndarray):
        return ArraySource("an array", side)
    if is_model(side):
        model = load(side, drawn.checkpoint, drawn.ema, device, ema_length=drawn.ema_length)
        return model if drawn.guide is None else model.guided_by(drawn.guide)
    return FeatureStatistics.load(side) if is_statistics_file(side) else open_source(side)


def _side(
    side: Source | FeatureStatistics | Model, other: Source | FeatureStatistics | Model, drawn: Drawn
) -> Source | FeatureStatistics:
    """Images as they are; a model as the images that it draws, to be compared with `other`."""
    if not isinstance(side, Model):
        return side
    reference = None if isinstance(other, Model) else other
    sampling = change_sampling(side.config.sampling, **drawn.changes)
    return run_source(side, reference, sampling, drawn.seed, drawn.per_class)


def _subset(side: Source | FeatureStatistics, n: int, seed: int, evenly: bool) -> Source:
    """Evenly over the classes if all sides have some: else the mixture of one would change, and not the other's."""
    if isinstance(side, FeatureStatistics):
        raise UserError(f"--n draws images, and {side.name} holds only their mean and covariance")
    return side.subset(balanced_rows(len(side), side.labels if evenly else None, n, seed))
