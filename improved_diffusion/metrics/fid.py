"""The Fréchet Inception distance of two sets of images (Heusel et al. 2017, arXiv:1706.08500), and what it would be
with endlessly many images."""

from __future__ import annotations

import warnings

import numpy as np

from improved_diffusion.errors import UserError
from improved_diffusion.metrics.estimate import Estimate, Influence
from improved_diffusion.metrics.features import Features
from improved_diffusion.metrics.frechet import FrechetInfluence, distance_by_factor
from improved_diffusion.metrics.inception.network import SPATIAL
from improved_diffusion.metrics.statistics import FeatureStatistics, cached_statistics, statistics_of

# FID-infinity: a set needs so many images for each feature, or its bias is not yet one over n, which misleads.
IMAGES_PER_FEATURE = 2.5
MOST_PARTS = 4

Side = Features | FeatureStatistics


def metric_name(features: int) -> str:
    """`FID` means 2048 features and `sFID` the spatial ones; any other size is named, so that no one takes it for the
    standard metric."""
    return {2048: "FID", SPATIAL: "sFID"}.get(features, f"FID{features}")


def frechet_inception_distance(real: Side, fake: Side) -> Estimate:
    """The distance between two sets, each by its features or by saved statistics, whose images count as fixed.

    Raises:
        UserError: features of different sizes, or made with different settings; the message names the difference.
    """
    real_statistics, fake_statistics = statistics(real), statistics(fake)
    check_comparable(real_statistics, fake_statistics)
    influences = [
        _influence(side, own, other)
        for side, own, other in [(real, real_statistics, fake_statistics), (fake, fake_statistics, real_statistics)]
        if isinstance(side, Features)
    ]
    return Estimate(_distance(real_statistics, fake_statistics), tuple(influences), least=0.0)


def statistics(side: Side) -> FeatureStatistics:
    """A side's mean and covariance."""
    return cached_statistics(side) if isinstance(side, Features) else side


def _distance(real: FeatureStatistics, fake: FeatureStatistics) -> float:
    if fake.centred is None and real.centred is not None:  # few samples are a factor that costs nothing
        real, fake = fake, real
    fake_factor = fake.factor if fake.centred is not None else None
    return distance_by_factor(real.mean, real.factor, fake.mean, fake.cov, fake_factor)


def _influence(features: Features, own: FeatureStatistics, other: FeatureStatistics) -> Influence:
    influence = FrechetInfluence(own.mean, own.factor, other.mean, other.cov)
    values = np.concatenate([influence(block).numpy() for block in features.blocks()])
    return Influence(values, features.labels)


def fid_infinity(real: Features, fake: Features, seed: int = 0) -> Estimate:
    """The distance with its bias removed, by extrapolation to endlessly many images (Chong & Forsyth 2020,
    arXiv:1911.07023).

    The bias falls as 1/n. Both sets are divided, class by class, into k parts, and the distances between the parts
    averaged, for k = 1, 2, ...; a line through these averages, against k, is taken at k = 0. As each average uses every
    image once, resampling the images moves them all alike: the influences are those of the distance itself.

    `details`: `points`, a list of (images of the smaller set in a part, average distance).

    Raises:
        UserError: a set has fewer than 2.5 images for each feature.
    """
    whole = frechet_inception_distance(real, fake)
    smaller, d = min(real.n, fake.n), real.d
    if smaller < IMAGES_PER_FEATURE * d:
        raise UserError(
            f"FID-infinity of {d} features needs at least {int(np.ceil(IMAGES_PER_FEATURE * d)):,} images of each set, "
            f"and the smaller has {smaller:,}: below that its bias is not one over n"
        )
    # Smaller parts would bend the line; but it takes two points.
    most = max(2, min(MOST_PARTS, int(smaller / (IMAGES_PER_FEATURE * d))))
    rng = np.random.default_rng(seed)
    averages = [whole.value]
    for parts in range(2, most + 1):
        pairs = zip(_divide(real, parts, rng), _divide(fake, parts, rng), strict=True)
        averages.append(np.mean([_distance(statistics_of(x), statistics_of(y)) for x, y in pairs]))
    counts = np.arange(1, most + 1)
    slope, intercept = np.polyfit(counts, averages, 1)
    return Estimate(
        value=float(intercept),
        influences=whole.influences,
        details={
            "points": [(smaller // int(count), float(value)) for count, value in zip(counts, averages, strict=True)],
            "bias": float(whole.value - intercept),
        },
    )


def _divide(features: Features, parts: int, rng: np.random.Generator) -> list[Features]:
    """Disjoint parts, each with its share of every class."""
    order = rng.permutation(features.n)
    if features.labels is not None:
        order = order[np.argsort(features.labels[order], kind="stable")]
    return [features.take(np.sort(order[part::parts])) for part in range(parts)]


def per_class(real: Features, fake: Features) -> dict[str, tuple[Estimate, int, int]]:
    """The distance of each class from itself, {class name: (estimate, n_real, n_fake)}, the worst first.

    Classes with fewer than two images on a side are left out with a warning.

    Raises:
        UserError: a side has no classes, the sides' differ, or none has images enough.
    """
    estimates: dict[str, tuple[Estimate, int, int]] = {}
    left_out = []
    for label, name in common_classes(real, fake).items():
        rows = [np.flatnonzero(side.labels == label) for side in (real, fake)]
        if min(map(len, rows)) < 2:
            left_out.append(name)
            continue
        estimate = frechet_inception_distance(real.take(rows[0]), fake.take(rows[1]))
        estimates[name] = (estimate, len(rows[0]), len(rows[1]))
    if not estimates:
        raise UserError(f"no class has at least 2 images in both {real.name} and {fake.name}")
    if left_out:
        warnings.warn(
            f"{len(left_out)} classes have fewer than 2 images on a side and are left out: {', '.join(left_out[:5])}",
            stacklevel=2,
        )
    return dict(sorted(estimates.items(), key=lambda item: -item[1][0].value))


def common_classes(real: Features, fake: Features) -> dict[int, str]:
    """{label: name} of all classes; a side without names takes the other's."""
    for side in (real, fake):
        if side.labels is None:
            raise UserError(
                f"{side.name} has no classes; a packed set, a folder of class folders, a run, an .npz with labels have"
            )
    names = real.class_names or fake.class_names
    for side in (real, fake):
        if side.class_names not in (None, names):
            difference = sorted(set(names) ^ set(side.class_names))
            what = ", ".join(difference[:5]) if difference else "the same in another order"
            raise UserError(f"{real.name} and {fake.name} have different classes: {what}")
    labels = sorted({*real.labels.tolist(), *fake.labels.tolist()})
    if names is not None and not (labels[0] >= 0 and labels[-1] < len(names)):
        raise UserError(
            f"{real.name} and {fake.name} have labels from {labels[0]} to {labels[-1]}, of {len(names)} classes"
        )
    return {label: names[label] if names else str(label) for label in labels}


def check_comparable(real: FeatureStatistics, fake: FeatureStatistics) -> None:
    """Warn where statistics do not say what they were made with, or n < d.

    Raises:
        UserError: they were made with other settings; the message names the difference.
    """
    if real.features != fake.features:
        raise UserError(
            f"{real.name} has statistics of {real.features} features and {fake.name} of {fake.features}: "
            f"measure with --features {real.features} or {fake.features}, the one that was saved"
        )
    for statistics in (real, fake):
        if statistics.settings is None:
            warnings.warn(
                f"{statistics.name} does not say with which weights and preprocessing its statistics were made: "
                "the distance means something only if they were the same",
                stacklevel=3,
            )
    check_settings(real, fake)


def check_settings(left: Side, right: Side) -> None:
    """Raise UserError, which names the difference, where two sides are known to be made with different settings."""
    if left.settings is not None and right.settings is not None and left.settings != right.settings:
        difference = left.settings.difference(right.settings)
        raise UserError(f"{left.name} and {right.name} were made with different settings: {difference}")
