from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from improved_diffusion.personalize.studies.survey.ratings import (
    crossed_resamples,
    krippendorff_alpha,
    percentile_interval,
    resampled_means,
)

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


def test_resampled_means_are_the_means_of_the_ratings_drawn():
    rng = np.random.default_rng(0)
    ratings = rng.integers(0, 6, (4, 7)).astype(float)
    ratings[rng.random(ratings.shape) < 0.3] = np.nan
    resamples = crossed_resamples(4, np.arange(7), replicates=20)
    for people, images, mean in zip(*resamples, resampled_means(ratings, resamples), strict=True):
        drawn = ratings[np.repeat(np.arange(4), people)][:, np.repeat(np.arange(7), images)]
        assert mean == pytest.approx(np.nanmean(drawn))


def test_images_of_one_item_are_drawn_together():
    images = crossed_resamples(3, np.array([0, 1, 0, 2]), replicates=50).images
    np.testing.assert_array_equal(images[:, 0], images[:, 2])
    assert (images[:, 0] != images[:, 1]).any()


def test_the_spread_is_that_of_people_and_images_together():
    """Ratings that are a person's effect plus an image's: the variance of their mean is known."""
    rng = np.random.default_rng(0)
    people, images = rng.normal(size=(5, 1)), 2 * rng.normal(size=(1, 40))
    means = resampled_means(people + images, crossed_resamples(5, np.arange(40), replicates=50_000))
    assert means.var() == pytest.approx(people.var(ddof=1) / 5 + images.var(ddof=1) / 40, rel=0.03)
    assert means.mean() == pytest.approx((people + images).mean(), abs=0.02)


@pytest.mark.parametrize(("people", "low", "high"), [(5, 0.86, 0.94), (20, 0.92, 0.98)])
def test_intervals_hold_the_truth(people, low, high):
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(400):
        ratings = 0.7 * rng.normal(size=(people, 1)) + 0.7 * rng.normal(size=50) + 0.8 * rng.normal(size=(people, 50))
        interval = percentile_interval(resampled_means(ratings, crossed_resamples(people, np.arange(50), 400, seed)))
        held += interval[0] <= 0 <= interval[1]
    assert low <= held / 400 <= high


def test_no_interval_where_replicates_do_not_differ():
    assert percentile_interval(np.array([4.0, 4.0, np.nan])) is None
    assert percentile_interval(np.array([np.nan, np.nan])) is None
