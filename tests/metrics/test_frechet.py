from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from improved_diffusion.metrics import frechet_distance


def rotation(d: int, rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


def gaussian(n: int, d: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and covariance of n samples in d dimensions with a spectrum that falls off, and the samples themselves."""
    x = (rng.normal(size=(n, d)) * np.arange(1, d + 1) ** -0.8) @ rotation(d, rng) + rng.normal(size=d)
    return x.mean(axis=0), np.cov(x.T), x


@pytest.mark.parametrize("d", [1, 5, 64, 200])
def test_commuting_covariances_have_a_closed_form(d):
    rng = np.random.default_rng(d)
    q, a, b = rotation(d, rng), rng.uniform(0.01, 4, d), rng.uniform(0.01, 4, d)
    mean1, mean2 = rng.normal(size=d), rng.normal(size=d)
    expected = ((mean1 - mean2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    actual = frechet_distance(mean1, (q * a) @ q.T, mean2, (q * b) @ q.T)
    assert actual == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [100, 1000])
def test_equals_the_matrix_square_root_of_scipy(n):
    rng = np.random.default_rng(n)
    mean1, cov1, _ = gaussian(n, 40, rng)
    mean2, cov2, _ = gaussian(n, 40, rng)
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-6)


def test_fewer_samples_than_dimensions_lose_nothing():
    rng = np.random.default_rng(0)
    mean1, cov1, x1 = gaussian(20, 100, rng)
    mean2, cov2, x2 = gaussian(30, 100, rng)
    # The same trace from the samples: no (d, d) matrix, so no singular one.
    root = np.linalg.svd((x1 - mean1) @ (x2 - mean2).T, compute_uv=False).sum() / np.sqrt(19 * 29)
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * root
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [20, 500])
def test_is_symmetric_and_zero_only_between_equals(n):
    rng = np.random.default_rng(n)
    mean1, cov1, _ = gaussian(n, 50, rng)
    mean2, cov2, _ = gaussian(n, 50, rng)
    there, back = frechet_distance(mean1, cov1, mean2, cov2), frechet_distance(mean2, cov2, mean1, cov1)
    assert there == pytest.approx(back, rel=1e-12)
    assert there > 0.1
    assert 0 <= frechet_distance(mean1, cov1, mean1, cov1) < 1e-12


def test_points_without_any_variance():
    zero = np.zeros((3, 3))
    assert frechet_distance(np.zeros(3), zero, np.array([3.0, 4.0, 0.0]), zero) == pytest.approx(25)
    assert frechet_distance(np.zeros(3), zero, np.zeros(3), np.eye(3)) == pytest.approx(3)


def test_takes_tensors_of_any_dtype_and_computes_in_float64():
    rng = np.random.default_rng(0)
    mean1, cov1, _ = gaussian(100, 30, rng)
    mean2, cov2, _ = gaussian(100, 30, rng)
    halves = [torch.from_numpy(a).float() for a in (mean1, cov1, mean2, cov2)]
    exact = frechet_distance(*(h.double().numpy() for h in halves))
    assert frechet_distance(*halves) == exact


def test_bad_arguments_are_named():
    eye = np.eye(2)
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        frechet_distance(np.zeros(2), eye, np.zeros(2), np.eye(3))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(np.zeros(2), eye, np.array([0, np.nan]), eye)
