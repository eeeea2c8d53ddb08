"""Precision and recall against torch-fidelity, the rest against distances by SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch_fidelity.metric_prc import prc_features_to_metric

from improved_diffusion.errors import UserError
from improved_diffusion.metrics import neighbours
from improved_diffusion.metrics.neighbours import density_coverage, memorisation, nearest, precision_recall


@pytest.fixture(params=[2048, 37], ids=["one block", "blocks"], autouse=True)
def block(request, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", request.param)


def own_distances(x: np.ndarray, k: int) -> np.ndarray:
    return np.sort(cdist(x, x), axis=1)[:, k]  # column 0 is the distance to itself


def test_precision_and_recall_are_torch_fidelitys(two_sets):
    real, fake = two_sets
    expected = prc_features_to_metric(
        torch.from_numpy(fake.array),
        torch.from_numpy(real.array),
        prc_neighborhood=3,
        save_cpu_ram=False,
        verbose=False,
    )
    found = precision_recall(real, fake)
    assert 0.1 < found["precision"].value < 0.95
    assert found["precision"].value == pytest.approx(expected["precision"])
    assert found["recall"].value == pytest.approx(expected["recall"])
    assert found["precision"].influences[0].values.mean() == pytest.approx(expected["precision"])


def test_density_and_coverage_are_their_definitions(two_sets):
    real, fake = (side.array.astype(np.float64) for side in two_sets)
    radius = own_distances(real, 5)
    distances = cdist(real, fake)
    found = density_coverage(*two_sets)
    assert found["density"].value == pytest.approx((distances <= radius[:, None]).sum() / 5 / len(fake))
    assert found["coverage"].value == pytest.approx((distances.min(axis=1) <= radius).mean())


def test_equal_distributions_score_about_one_and_far_ones_nothing(make_features):
    rng = np.random.default_rng(0)
    x, y = (make_features(rng.normal(size=(400, 4))) for _ in range(2))
    assert density_coverage(x, y)["density"].value == pytest.approx(1, abs=0.15)
    far = make_features(rng.normal(size=(400, 4)) + 50)
    found = precision_recall(x, far) | density_coverage(x, far)
    assert {name: estimate.value for name, estimate in found.items()} == dict.fromkeys(found, 0.0)


def test_the_nearest_is_scipys(two_sets):
    distances, rows = nearest(two_sets[1], two_sets[0])
    expected = cdist(two_sets[1].array, two_sets[0].array)
    np.testing.assert_array_equal(rows, expected.argmin(axis=1))
    np.testing.assert_allclose(distances, expected.min(axis=1), rtol=1e-4)


def test_copies_are_found_and_named(make_features):
    rng = np.random.default_rng(0)
    train, real = (make_features(rng.normal(size=(300, 16))) for _ in range(2))
    fake = rng.normal(size=(200, 16))
    fake[:20] = train.array[50:70] + 1e-3 * rng.normal(size=(20, 16))
    found = memorisation(train, real, make_features(fake))
    details = found.details
    assert details["near_copies"] == pytest.approx(0.1, abs=0.02)
    assert {(row, partner) for row, partner, _ in details["closest"][:20]} == {(i, 50 + i) for i in range(20)}
    assert all(ratio < 0.01 for _, _, ratio in details["closest"][:20])
    assert found.value == pytest.approx(details["held_out"] + 0.1 * (1 - details["held_out"]), abs=0.1)
    honest = memorisation(train, real, make_features(rng.normal(size=(200, 16))))
    assert honest.value == pytest.approx(honest.details["held_out"], abs=0.1)


def test_copies_of_images_that_occur_twice_in_the_training_set(make_features):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(100, 16)) + 5
    train = make_features(np.concatenate([images, images]))
    real = make_features(rng.normal(size=(100, 16)) + 5)
    found = memorisation(train, real, make_features(images[:50]))
    assert (found.value, found.details["near_copies"], found.details["n_train"]) == (1.0, 1.0, 200)
    assert found.details["held_out"] < 0.8


def test_too_few_images_for_their_neighbours(make_features):
    few = make_features(np.eye(3, 4))
    with pytest.raises(UserError, match="3 neighbours need more than 3 images"):
        precision_recall(few, few)
