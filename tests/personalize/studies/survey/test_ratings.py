from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from improved_diffusion.metrics.estimate import bootstrap_interval
from improved_diffusion.personalize.studies.survey.ratings import contrast, krippendorff_alpha

_ = np.nan
# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", the data of its sections C and E.
PUBLISHED = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
        [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
    ]
)


def by_coincidences(ratings: np.ndarray) -> float | None:
    """Alpha as the paper defines it: over all pairs of values within images, and over all pairs of all values."""
    units = [unit[~np.isnan(unit)] for unit in ratings.T]
    units = [unit for unit in units if len(unit) >= 2]
    values = [value for unit in units for value in unit]
    observed = sum((a - b) ** 2 / (len(u) - 1) for u in units for a, b in itertools.permutations(u, 2))
    expected = sum((a - b) ** 2 for a, b in itertools.permutations(values, 2))
    return None if expected == 0 else 1 - (len(values) - 1) * observed / expected


def test_alpha_of_the_published_example():
    assert krippendorff_alpha(PUBLISHED) == pytest.approx(0.849, abs=5e-4)


@given(arrays(float, st.tuples(st.integers(1, 5), st.integers(1, 8)), elements=st.sampled_from([_, 0, 1, 2, 5])))
def test_alpha_is_that_of_all_pairs(ratings):
    expected = by_coincidences(ratings)
    assert krippendorff_alpha(ratings) == (expected if expected is None else pytest.approx(expected, abs=1e-12))


def test_influences_are_those_of_leaving_one_out():
    """To first order: without a person, or an item's images, the value is less by an n-th of the influence."""
    rng = np.random.default_rng(0)
    ratings = rng.integers(0, 6, (30, 40)).astype(float)
    ratings[rng.random(ratings.shape) < 0.3] = np.nan
    items, sides = np.arange(40) % 25, np.arange(40)[None] // 20 == np.array([[0], [1]])
    whole = contrast(ratings, items, *sides)
    assert whole.value == pytest.approx(np.nanmean(ratings[:, :20]) - np.nanmean(ratings[:, 20:]))
    of_people, of_items = (influence.values for influence in whole.influences)
    assert (len(of_people), len(of_items)) == (30, 25)
    for person, influence in enumerate(of_people):
        moved = contrast(np.delete(ratings, person, axis=0), items, *sides).value - whole.value
        assert moved == pytest.approx(-influence / 30, rel=0.1, abs=2e-3)
    for item, influence in enumerate(of_items):
        left = items != item
        moved = contrast(ratings[:, left], items[left], *sides[:, left]).value - whole.value
        assert moved == pytest.approx(-influence / 25, rel=0.1, abs=6e-3)


def test_the_spread_is_that_of_people_and_images_together():
    """Ratings that are a person's effect plus an image's: the variance of their mean is known."""
    rng = np.random.default_rng(0)
    people, images = rng.normal(size=(5, 1)), 2 * rng.normal(size=(1, 40))
    low, high = interval(people + images, replicates=20_000)
    deviation = np.sqrt(people.var(ddof=1) / 5 + images.var(ddof=1) / 40)
    assert (high - low) / (2 * 1.96) == pytest.approx(deviation, rel=0.03)
    assert (low + high) / 2 == pytest.approx((people + images).mean(), abs=0.03)


@pytest.mark.parametrize(("people", "low", "high"), [(5, 0.85, 0.93), (20, 0.91, 0.97)])
def test_intervals_hold_the_truth(people, low, high):
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(400):
        ratings = 0.7 * rng.normal(size=(people, 1)) + 0.7 * rng.normal(size=50) + 0.8 * rng.normal(size=(people, 50))
        bounds = interval(ratings, replicates=400, seed=seed)
        held += bounds[0] <= 0 <= bounds[1]
    assert low <= held / 400 <= high


def interval(ratings: np.ndarray, **how: int) -> tuple[float, float]:
    """Of the mean, each image being an item."""
    images = ratings.shape[1]
    return bootstrap_interval(contrast(ratings, np.arange(images), np.ones(images, bool)), **how)
