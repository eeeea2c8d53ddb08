"""KID against torch-fidelity on the same features, and its interval against what resampling gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from improved_diffusion.metrics import kernel
from improved_diffusion.metrics.estimate import bootstrap_interval
from improved_diffusion.metrics.kernel import kernel_inception_distance


def torch_fidelity(real: np.ndarray, fake: np.ndarray, subset_size: int, subsets: int = 1) -> dict[str, float]:
    return kid_features_to_metric(
        torch.from_numpy(fake), torch.from_numpy(real), kid_subsets=subsets, kid_subset_size=subset_size, verbose=False
    )


def test_the_value_is_torch_fidelitys_of_all_images(two_sets):
    real, fake = two_sets[0].take(np.arange(240)), two_sets[1]
    expected = torch_fidelity(real.array, fake.array, 240)["kernel_inception_distance_mean"]
    assert kernel_inception_distance(real, fake).value == pytest.approx(expected, rel=1e-4)


def test_subsets_agree_with_torch_fidelitys_up_to_their_choice(two_sets, monkeypatch):
    monkeypatch.setattr(kernel, "SUBSET_SIZE", 100)
    details = kernel_inception_distance(*two_sets).details
    theirs = torch_fidelity(two_sets[0].array, two_sets[1].array, 100, subsets=100)
    deviation = theirs["kernel_inception_distance_std"]
    assert details["subset_mean"] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=0.5 * deviation)
    assert details["subset_std"] == pytest.approx(deviation, rel=0.3)


def test_blocks_change_nothing(two_sets, monkeypatch):
    whole = kernel_inception_distance(*two_sets)
    monkeypatch.setattr(kernel, "BLOCK", 37)
    blocks = kernel_inception_distance(*two_sets)
    assert blocks.value == pytest.approx(whole.value, rel=1e-6)
    for one, other in zip(blocks.influences, whole.influences, strict=True):
        np.testing.assert_allclose(one.values, other.values, rtol=1e-5)


def test_it_is_unbiased_and_its_interval_has_the_right_width(make_features):
    rng = np.random.default_rng(0)
    values, widths = [], []
    for _ in range(200):
        real, fake = (make_features(rng.normal(size=(60, 8)) + shift) for shift in (0.0, 0.5))
        estimate = kernel_inception_distance(real, fake)
        low, high = bootstrap_interval(estimate, replicates=300)
        values.append(estimate.value)
        widths.append(high - low)
    big = [make_features(rng.normal(size=(4000, 8)) + shift) for shift in (0.0, 0.5)]
    truth = kernel_inception_distance(*big).value
    assert np.mean(values) == pytest.approx(truth, abs=4 * np.std(values) / np.sqrt(200))
    assert np.mean(widths) / (2 * 1.96) == pytest.approx(np.std(values), rel=0.25)
