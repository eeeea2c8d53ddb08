from __future__ import annotations

import numpy as np
import pytest

from improved_diffusion.metrics.estimate import Estimate, Influence, bootstrap_interval


def test_the_interval_of_a_mean_is_the_textbook_one():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_interval(Estimate(values.mean(), (Influence(values),)), replicates=20_000)
    half = 1.96 * values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_two_sets_add_their_variances_and_confidence_widens():
    rng = np.random.default_rng(0)
    influences = Influence(rng.normal(0, 3, 300)), Influence(rng.normal(0, 4, 300))
    low, high = bootstrap_interval(Estimate(0.0, influences), replicates=20_000)
    assert (high - low) / 2 == pytest.approx(1.96 * 5 / np.sqrt(300), rel=0.1)
    wider = bootstrap_interval(Estimate(0.0, influences), confidence=0.99)
    assert wider[1] - wider[0] > 1.2 * (high - low)


def test_differences_between_classes_are_no_uncertainty_when_each_keeps_its_number():
    labels = np.repeat(np.arange(10), 30)
    within = np.random.default_rng(0).normal(0, 0.1, 300)
    estimate = Estimate(0.0, (Influence(within + labels, labels),))
    low, high = bootstrap_interval(estimate, replicates=20_000)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.1 / np.sqrt(300), rel=0.15)
    low, high = bootstrap_interval(Estimate(0.0, (Influence(within + labels),)))
    assert (high - low) / 2 == pytest.approx(1.96 * labels.std() / np.sqrt(300), rel=0.15)


def test_small_classes_do_not_narrow_the_interval():
    labels = np.repeat(np.arange(500), 2)
    values = np.random.default_rng(0).normal(size=1000)
    low, high = bootstrap_interval(Estimate(0.0, (Influence(values, labels),)), replicates=5000)
    assert (high - low) / 2 == pytest.approx(1.96 / np.sqrt(1000), rel=0.1)
    assert bootstrap_interval(Estimate(0.0, (Influence(values, np.arange(1000)),)))[1] > 0.04  # one image of each


def test_the_seed_decides_and_constants_do_not_matter():
    values = np.random.default_rng(0).normal(size=50)
    first = bootstrap_interval(Estimate(1.0, (Influence(values),)), seed=1)
    assert first == bootstrap_interval(Estimate(1.0, (Influence(values),)), seed=1)
    assert first != bootstrap_interval(Estimate(1.0, (Influence(values),)), seed=2)
    assert first == pytest.approx(bootstrap_interval(Estimate(1.0, (Influence(values + 1000),)), seed=1))


@pytest.mark.parametrize("n", [10, 100])
def test_a_share_of_none_or_of_all_has_the_exact_interval(n):
    from scipy.stats import binomtest

    for value in (0.0, 1.0):
        estimate = Estimate(value, (Influence(np.full(n, value)),), least=0, most=1)
        exact = binomtest(int(n * value), n).proportion_ci(0.95)
        assert bootstrap_interval(estimate) == pytest.approx((exact.low, exact.high))


def test_bounds_and_what_has_no_interval():
    values = np.random.default_rng(0).normal(size=50)
    low, high = bootstrap_interval(Estimate(0.1, (Influence(values),), least=0.0, most=0.2))
    assert (low, high) == (0.0, 0.2)
    assert bootstrap_interval(Estimate(1.0)) is None
