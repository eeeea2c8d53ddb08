"""Measuring a set of images with any of the metrics: what each needs, and a record of what it was measured with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from improved_diffusion.errors import UserError
from improved_diffusion.metrics.estimate import Estimate, bootstrap_interval
from improved_diffusion.metrics.features import Features
from improved_diffusion.metrics.fid import Side, fid_infinity, frechet_inception_distance, metric_name, per_class
from improved_diffusion.metrics.images.sources import balanced_rows
from improved_diffusion.metrics.inception.extractor import FeatureSettings
from improved_diffusion.metrics.inception.network import LOGITS, SPATIAL
from improved_diffusion.metrics.inception_score import inception_score
from improved_diffusion.metrics.kernel import kernel_inception_distance
from improved_diffusion.metrics.neighbours import density_coverage, memorisation, precision_recall

METRICS = {
    "fid": "Fréchet distance of the features",
    "fid-infinity": "the same, extrapolated to endlessly many images",
    "sfid": "Fréchet distance of spatial features",
    "kid": "kernel distance, unbiased",
    "precision-recall": "shares of the images within the other set's manifold",
    "density-coverage": "the same, robust against outliers",
    "per-class": "FID64 of each class",
    "inception-score": "of the fake images alone; needs the classifier's weights",
    "floor": "FID of training images, as many as there are fake ones; needs --train",
    "memorisation": "the share of images that are closer to a training image than its own neighbour; needs --train",
}
OF_TRAINING_IMAGES = ("floor", "memorisation")
PER_CLASS_FEATURES = 64  # larger features would need more images of each class than anyone has


@dataclass(frozen=True)
class Measurement:
    """One number, how certain it is, and all that it was measured with."""

    metric: str
    features: int  # d
    value: float
    low: float | None  # bounds of the interval; None where no images were there to resample
    high: float | None
    confidence: float
    n_real: int | None  # None where saved statistics do not say, and for a metric of the fake images alone
    n_fake: int | None
    preprocessing: str | None
    precision: str | None
    weights_hash: str | None
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ImageSets:
    """What is compared, each as {feature size: features}; saved statistics in place of features serve FID alone."""

    real: dict[int, Side]
    fake: dict[int, Side]
    train: dict[int, Features] | None = None


def feature_sizes(metrics: Iterable[str], features: int) -> set[int]:
    """The sizes that `metrics` need, where `features` is the one that was chosen."""
    special = {"sfid": SPATIAL, "per-class": PER_CLASS_FEATURES, "inception-score": LOGITS}
    return {special.get(metric, features) for metric in metrics}


def measure(
    sets: ImageSets,
    metrics: Sequence[str],
    features: int = 2048,
    device: torch.device | str = "cpu",
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Measurement]:
    """Measure `sets.fake` against `sets.real`.

    Args:
        sets: with every size of `feature_sizes(metrics, features)`.
        metrics: names from METRICS.
        features: size, for the metrics that leave a choice.
        device: where kernels and neighbours are computed.
        confidence: of the intervals.
        seed: of all that is random: subsets, partitions, the bootstrap.

    Raises:
        UserError: an unknown metric, or one that needs what is not there.
    """
    measurements = []
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"no metric {metric!r}: use {', '.join(METRICS)}")
        if metric in OF_TRAINING_IMAGES and sets.train is None:
            raise UserError(f"{metric} needs the images that the model was trained on: give them with --train")
        (size,) = feature_sizes([metric], features)
        for name, estimate, n_real, n_fake in _estimates(metric, sets, size, device, seed):
            interval = bootstrap_interval(estimate, confidence, seed=seed) or (None, None)
            settings = _settings(sets, size)
            measurements.append(
                Measurement(
                    metric=name,
                    features=size,
                    value=estimate.value,
                    low=interval[0],
                    high=interval[1],
                    confidence=confidence,
                    n_real=n_real,
                    n_fake=n_fake,
                    preprocessing=settings.preprocessing if settings else None,
                    precision=settings.precision if settings else None,
                    weights_hash=settings.weights_hash if settings else None,
                    notes=_notes(metric, size, sets, n_real, n_fake),
                    details=estimate.details,
                )
            )
    return measurements


Named = tuple[str, Estimate, int | None, int | None]  # the metric's name, the estimate, n_real, n_fake


def _estimates(metric: str, sets: ImageSets, size: int, device: torch.device | str, seed: int) -> list[Named]:
    real, fake = sets.real.get(size), sets.fake[size]
    name = metric_name(size)
    if metric == "inception-score":
        return [("Inception Score", inception_score(_images(fake, metric)), None, fake.n)]
    counts = (real.n, fake.n)
    if metric in ("fid", "sfid"):
        return [(name, frechet_inception_distance(real, fake), *counts)]
    real = _images(real, metric)
    if metric == "floor":
        train = sets.train[size]
        train = train.take(balanced_rows(train.n, train.labels, fake.n or train.n, seed))
        return [(f"{name} floor", frechet_inception_distance(real, train), real.n, train.n)]
    fake = _images(fake, metric)
    if metric == "fid-infinity":
        return [(f"{name}-infinity", fid_infinity(real, fake, seed), *counts)]
    if metric == "kid":
        return [("KID" if size == 2048 else f"KID{size}", kernel_inception_distance(real, fake, device, seed), *counts)]
    if metric == "per-class":
        return [(f"{name} of {label}", estimate, *of) for label, (estimate, *of) in per_class(real, fake).items()]
    if metric == "memorisation":
        return [("memorisation", memorisation(sets.train[size], real, fake, device), *counts)]
    of_both = {"precision-recall": precision_recall, "density-coverage": density_coverage}[metric]
    return [(label, estimate, *counts) for label, estimate in of_both(real, fake, device=device).items()]


def _images(side: Side, metric: str) -> Features:
    if not isinstance(side, Features):
        raise UserError(f"{metric} needs the images themselves: {side.name} holds only their mean and covariance")
    return side


def _settings(sets: ImageSets, size: int) -> FeatureSettings | None:
    sides = [side for side in (sets.real.get(size), sets.fake.get(size)) if side is not None]
    return next((side.settings for side in sides if side.settings is not None), None)


def _notes(metric: str, size: int, sets: ImageSets, n_real: int | None, n_fake: int | None) -> tuple[str, ...]:
    notes = []
    if metric in ("fid", "sfid", "floor"):
        if few := [n for n in (n_real, n_fake) if n is not None and n < size]:
            notes.append(
                f"{min(few):,} images for {size} features: the covariance is singular and the value is biased "
                "upwards; compare only values of equal n"
            )
        fixed = [side.name for side in (sets.real[size], sets.fake[size]) if not isinstance(side, Features)]
        if fixed:
            notes.append(f"the interval takes {' and '.join(fixed)} as fixed: there were no images to resample")
    return tuple(notes)
