"""A number computed from samples, with what is needed to say how certain it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, eq=False)
class Influence:
    """How each image of one set moves an estimate, to first order.

    values: float64 (n,); only differences between them matter. A plain mean has the averaged values themselves.
    labels: the class of each image, (n,), or None; resampling keeps the number of images of each class.
    """

    values: np.ndarray
    labels: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Estimate:
    """A value, the influence of the images of each set that it was computed from, and what else there is to tell."""

    value: float
    influences: tuple[Influence, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    least: float = -np.inf  # what the value cannot fall below
    most: float = np.inf  # nor exceed


@dataclass(frozen=True)
class Score:
    """A mean over images, and where it would fall 95 % of the time were the images drawn anew; a single image cannot
    tell."""

    mean: float
    low: float | None
    high: float | None
    n: int


def mean_score(values: ArrayLike) -> Score:
    """The mean of one value for each image, (n,), with a bootstrap interval over the images."""
    array = np.asarray(values, np.float64)
    estimate = Estimate(float(array.mean()), (Influence(array),))
    low, high = bootstrap_interval(estimate) if len(array) > 1 else (None, None)
    return Score(estimate.value, low, high, len(array))


def bootstrap_interval(
    estimate: Estimate, confidence: float = 0.95, replicates: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """Where the estimate would fall `confidence` of the time, were the images drawn anew.

    A percentile bootstrap (Efron 1979) of the estimate's linear part: in each replicate the images of each class of
    each set are drawn with replacement, and the estimate moves by the mean of their influences. So a replicate costs a
    mean and not a matrix square root. What it leaves out, the curvature, shifts all values of one n alike: the interval
    is about the estimate at this n, its bias included.

    Returns:
        (low, high), or None where no influence is known.
    """
    if not estimate.influences:
        return None
    if estimate.value in (estimate.least, estimate.most) and np.isfinite([estimate.least, estimate.most]).all():
        return _at_an_end(estimate, confidence)
    rng = np.random.default_rng(seed)
    moved = np.full(replicates, estimate.value)
    for influence in estimate.influences:
        n = len(influence.values)
        for stratum in _strata(influence):
            moved += len(stratum) / n * _resampled_deviations(stratum, replicates, rng)
    tail = (1 - confidence) / 2
    low, high = np.quantile(moved, [tail, 1 - tail]).clip(estimate.least, estimate.most)
    return float(low), float(high)


def _at_an_end(estimate: Estimate, confidence: float) -> tuple[float, float]:
    """The interval of a share of none or of all, where a resample can show nothing else: Clopper & Pearson's (1934),
    whose other bound is that share at which so one-sided a sample is as unlikely as `confidence` asks."""
    n = len(estimate.influences[0].values)
    reach = (estimate.most - estimate.least) * (1 - ((1 - confidence) / 2) ** (1 / n))
    if estimate.value == estimate.least:
        return estimate.least, estimate.least + reach
    return estimate.most - reach, estimate.most


def _strata(influence: Influence) -> list[np.ndarray]:
    """The values of each class; all together where a class has but one image, which says nothing of its spread."""
    if influence.labels is None:
        return [influence.values]
    order = np.argsort(influence.labels, kind="stable")
    counts = np.unique(influence.labels, return_counts=True)[1]
    if counts.min() < 2:
        return [influence.values]
    return np.split(influence.values[order], np.cumsum(counts)[:-1])


def _resampled_deviations(values: np.ndarray, replicates: int, rng: np.random.Generator) -> np.ndarray:
    """(replicates,): means of resampled `values` about their mean.

    Resampling n values spreads as their variance with divisor n; the correction makes it that with n - 1, which matters
    where classes are small.
    """
    n = len(values)
    correction = np.sqrt(n / max(n - 1, 1))
    means = np.empty(replicates)
    rows = max(1, 10_000_000 // n)  # bounds the memory of the indices
    for start in range(0, replicates, rows):
        stop = min(start + rows, replicates)
        means[start:stop] = values[rng.integers(n, size=(stop - start, n))].mean(axis=1)
    return correction * (means - values.mean())
