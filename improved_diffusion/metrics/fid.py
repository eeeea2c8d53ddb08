"""The Fréchet Inception distance of two sets of images (Heusel et al. 2017, arXiv:1706.08500)."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path

from improved_diffusion.errors import UserError
from improved_diffusion.metrics.frechet import frechet_distance
from improved_diffusion.metrics.sources import StoredSource, open_source
from improved_diffusion.metrics.statistics import (
    FeatureStatistics,
    is_statistics_file,
)


@dataclass(frozen=True)
class FID:
    """One measured distance and what it was measured with."""

    metric: str  # FID, or FID64 and the like: another feature size gives another scale
    features: int
    value: float
    n_real: int | None  # None where saved statistics do not say
    n_fake: int | None
    preprocessing: str | None
    weights_hash: str | None


def metric_name(features: int) -> str:
    """`FID` means 2048 features; any other size is named, so that no one takes it for the standard metric."""
    return "FID" if features == 2048 else f"FID{features}"


def fid(real: FeatureStatistics, fake: FeatureStatistics) -> FID:
    """The distance between two sets by their statistics.

    Warns where a set has fewer images than features, or statistics do not say what they were made with.

    Raises:
        UserError: statistics of different sizes, or made with different settings; the message names the difference.
    """
    _check_comparable(real, fake)
    for statistics in (real, fake):
        if statistics.n is not None and statistics.n < statistics.features:
            warnings.warn(
                f"{statistics.name} has {statistics.n:,} images for {statistics.features} features: its covariance is "
                f"singular and {metric_name(real.features)} is biased upwards; compare only values of equal n",
                stacklevel=2,
            )
    settings = real.settings or fake.settings
    return FID(
        metric=metric_name(real.features),
        features=real.features,
        value=frechet_distance(real.mean, real.cov, fake.mean, fake.cov),
        n_real=real.n,
        n_fake=fake.n,
        preprocessing=settings.preprocessing if settings else None,
        weights_hash=settings.weights_hash if settings else None,
    )


def open_images_or_statistics(path: Path | str) -> StoredSource | FeatureStatistics:
    """Whatever lies at `path`: any source of images, or saved statistics.

    Raises:
        UserError: see `open_source` and `FeatureStatistics.load`.
    """
    return FeatureStatistics.load(path) if is_statistics_file(path) else open_source(path)


def _check_comparable(real: FeatureStatistics, fake: FeatureStatistics) -> None:
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
    if real.settings is not None and fake.settings is not None and real.settings != fake.settings:
        left, right = dataclasses.asdict(real.settings), dataclasses.asdict(fake.settings)
        differences = "; ".join(f"{key}: {left[key]!r} and {right[key]!r}" for key in left if left[key] != right[key])
        raise UserError(f"{real.name} and {fake.name} were made with different settings: {differences}")
