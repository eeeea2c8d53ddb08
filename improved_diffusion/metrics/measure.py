"""Measuring a set of images with any of the metrics: what each needs, and a record of what it was measured with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from improved_diffusion.errors import UserError
from improved_diffusion.metrics.class_accuracy import class_accuracy
from improved_diffusion.metrics.estimate import Estimate, bootstrap_interval
from improved_diffusion.metrics.features import Features
from improved_diffusion.metrics.fid import (
    Side,
    check_settings,
    fid_infinity,
    frechet_inception_distance,
    metric_name,
    per_class,
)
from improved_diffusion.metrics.images.sources import balanced_rows, proportional_rows
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
    "class-accuracy": "the share of the fake images that a linear probe puts into their class; needs --train",
}
OF_TRAINING_IMAGES = ("floor", "memorisation", "class-accuracy")
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
    class_name: str | None = None  # where it is of one class alone
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class FeatureSets:
    """What is compared, each as {feature size: features}; saved statistics in place of features serve FID alone."""

    real: Mapping[int, Side]
    fake: Mapping[int, Side]
    train: Mapping[int, Features] | None = None


def feature_sizes(metrics: Iterable[str], features: int) -> set[int]:
    """The sizes that `metrics` need, where `features` is the one that was chosen."""
    special = {"sfid": SPATIAL, "per-class": PER_CLASS_FEATURES, "inception-score": LOGITS}
    return {special.get(metric, features) for metric in metrics}


def measure(
    sets: FeatureSets,
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
        sides = _sides(metric, sets, size)
        settings = next((side.settings for side in sides.values() if side.settings is not None), None)
        for name, estimate, n_real, n_fake in _estimates(metric, sides, size, device, confidence, seed):
            interval = bootstrap_interval(estimate, confidence, seed=seed) or (None, None)
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
                    class_name=name.split(" of ", 1)[1] if metric == "per-class" else None,
                    notes=_notes(metric, size, sides, n_real, n_fake),
                    details=estimate.details,
                )
            )
    return measurements


Named = tuple[str, Estimate, int | None, int | None]  # the metric's name, the estimate, n_real, n_fake


def _sides(metric: str, sets: FeatureSets, size: int) -> dict[str, Side]:
    """What `metric` compares: `real`, `fake` and `train`, as far as it takes them; made with the same settings.

    Raises:
        UserError: features of the size are missing, statistics where images are needed, or other settings.
    """
    taken = {"inception-score": ["fake"], **dict.fromkeys(OF_TRAINING_IMAGES, ["real", "fake", "train"])}
    sides = {}
    for name in taken.get(metric, ["real", "fake"]):
        of_size = getattr(sets, name)
        if size not in of_size:
            raise UserError(f"{metric} needs features of size {size} of the {name} images: extract them too")
        sides[name] = of_size[size]
    for name, side in sides.items():
        needs_images = metric not in ("fid", "sfid") and not (metric == "floor" and name != "train")
        if needs_images and not isinstance(side, Features):
            raise UserError(f"{metric} needs the images themselves: {side.name} holds only their mean and covariance")
        check_settings(next(iter(sides.values())), side)
    return sides


def _estimates(
    metric: str, sides: dict[str, Side], size: int, device: torch.device | str, confidence: float, seed: int
) -> list[Named]:
    real, fake, train = (sides.get(name) for name in ("real", "fake", "train"))
    name = metric_name(size)
    if metric == "inception-score":
        return [("Inception Score", inception_score(fake, seed), None, fake.n)]
    counts = (real.n, fake.n)
    if metric in ("fid", "sfid"):
        return [(name, frechet_inception_distance(real, fake), *counts)]
    if metric == "floor":
        train = _like(fake, real, train, seed)
        return [(f"{name} floor", frechet_inception_distance(real, train), real.n, train.n)]
    if metric == "fid-infinity":
        return [(f"{name}-infinity", fid_infinity(real, fake, seed), *counts)]
    if metric == "kid":
        return [("KID" if size == 2048 else f"KID{size}", kernel_inception_distance(real, fake, device, seed), *counts)]
    if metric == "per-class":
        return [(f"{name} of {label}", estimate, *of) for label, (estimate, *of) in per_class(real, fake).items()]
    if metric == "memorisation":
        return [("memorisation", memorisation(train, real, fake, device), *counts)]
    if metric == "class-accuracy":
        return [(label, estimate, *counts) for label, estimate in class_accuracy(train, real, fake, confidence).items()]
    of_both = {"precision-recall": precision_recall, "density-coverage": density_coverage}[metric]
    return [(label, estimate, *counts) for label, estimate in of_both(real, fake, device=device).items()]


def _like(fake: Side, real: Side, train: Features, seed: int) -> Features:
    """Training images, as many as the fake ones, with the classes in proportion to theirs or, where they have none, to
    the real ones': with another mixture they would be farther from the real images than a perfect model's."""
    mixtures = [side for side in (fake, real) if isinstance(side, Features) and side.class_names == train.class_names]
    n = fake.n or train.n
    if train.labels is None or not mixtures or mixtures[0].labels is None:
        return train.take(balanced_rows(train.n, None, n, seed))
    shares = np.bincount(mixtures[0].labels, minlength=len(train.class_names or ())) / mixtures[0].n
    return train.take(proportional_rows(train.labels, shares, n, seed))


def _notes(metric: str, size: int, sides: dict[str, Side], n_real: int | None, n_fake: int | None) -> tuple[str, ...]:
    notes = []
    if metric in ("fid", "sfid", "floor", "per-class"):
        if few := [n for n in (n_real, n_fake) if n is not None and n <= size]:
            notes.append(
                f"{min(few):,} images for {size} features: the covariance is singular and the value is biased "
                "upwards; compare only values of equal n"
            )
        compared = [side for name, side in sides.items() if (metric, name) != ("floor", "fake")]
        if fixed := [side.name for side in compared if not isinstance(side, Features)]:
            notes.append(f"the interval takes {' and '.join(fixed)} as fixed: there were no images to resample")
    if metric == "memorisation" and sides["real"].content_hash == sides["train"].content_hash is not None:
        notes.append("REAL is the training set itself: what is said of the real images says nothing")
    if metric == "floor" and n_fake != sides["fake"].n:
        notes.append(f"of {n_fake:,} training images, all that there are of these classes: fewer than the fake ones")
    return tuple(notes)
