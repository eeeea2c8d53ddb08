"""A verdict is what a paired t-test says, and where nothing is decided it says so."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from improved_diffusion.metrics.verdicts import spread, t_interval, verdicts

scores = st.lists(st.floats(0.1, 100), min_size=2, max_size=6)


@given(scores, scores, st.sampled_from([0.9, 0.95]))
def test_the_interval_is_that_of_a_paired_t_test(first, second, confidence):
    n = min(len(first), len(second))
    differences = [b - a for a, b in zip(first[:n], second[:n], strict=True)]
    low, high = t_interval(differences, confidence)
    if np.std(differences) > 1e-6:
        expected = scipy.stats.ttest_rel(second[:n], first[:n]).confidence_interval(confidence)
        assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-6)
    else:
        assert low == pytest.approx(high, abs=1e-4)


@pytest.mark.parametrize("arms", [2, 3])
@pytest.mark.parametrize("seeds", [2, 3])
def test_where_nothing_differs_hardly_anything_wins(arms, seeds):
    rng = np.random.default_rng(0)
    wins = 0
    for _ in range(400):
        of_seed = rng.normal(size=seeds)  # what the runs of one seed share
        drawn = {str(arm): (3 + of_seed + 0.3 * rng.normal(size=seeds)).tolist() for arm in range(arms)}
        wins += any("wins" in line for line in verdicts(drawn))
    assert wins / 400 < 0.08  # 5 %, and what 400 draws leave open


def test_a_difference_that_every_seed_shows_is_found():
    of_seed = np.array([1.0, 3.0, 2.0, 9.0])  # far apart, as ranges they overlap
    noise = np.array([0.01, -0.01, 0.02, 0.0])
    (line,) = verdicts({"mse": (of_seed + 0.5).tolist(), "hybrid": (of_seed + noise).tolist()})
    assert "hybrid wins" in line
    assert "4 seeds" in line


def test_one_seed_decides_nothing():
    (line,) = verdicts({"mse": [3.0], "hybrid": [1.0]})
    assert "Not decided" in line
    assert "2.000" in line


def test_a_spread_is_said_where_there_is_one():
    assert spread([2.0]) == "2.000"
    assert spread([1.0, 3.0]) == "2.000 ± 1.414"
