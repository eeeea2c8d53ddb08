from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from improved_diffusion.metrics import Moments


def moments_of(chunks: list[np.ndarray], d: int) -> Moments:
    moments = Moments(d)
    for chunk in chunks:
        moments.update(torch.from_numpy(chunk))
    return moments


@settings(deadline=None, max_examples=60)
@given(
    d=st.integers(1, 8),
    cuts=st.lists(st.integers(0, 50), max_size=6),
    owners=st.lists(st.integers(0, 2), min_size=7, max_size=7),
    offset=st.sampled_from([0.0, 1.0, 1e6]),
    seed=st.integers(0, 1000),
)
def test_any_chunks_in_any_shards_equal_numpy(d, cuts, owners, offset, seed):
    x = np.random.default_rng(seed).normal(offset, 1.0, (50, d))
    chunks = np.split(x, sorted(cuts))
    shards = [moments_of([c for c, o in zip(chunks, owners, strict=False) if o == owner], d) for owner in range(3)]
    merged = Moments(d)
    for shard in shards:
        merged.merge(shard)
    assert merged.n == 50
    np.testing.assert_allclose(merged.mean, x.mean(axis=0), rtol=1e-12)
    # numpy centres on the mean of all 50: what is left of an offset of 1e6 is its rounding
    np.testing.assert_allclose(merged.covariance(), np.cov(x.T).reshape(d, d), rtol=1e-8, atol=1e-8)


def test_a_large_offset_costs_no_digits():
    rng = np.random.default_rng(0)
    small = rng.integers(-8, 9, (1000, 4)) / 16.0  # exact after the shift, too
    shifted = moments_of(np.split(small + 2.0**20, 10), 4)
    # Sums of squares, about 2^50, would be off by 2^-2 before the difference is taken.
    np.testing.assert_allclose(shifted.covariance(), np.cov(small.T), atol=1e-9)


def test_float32_features_are_accumulated_in_float64():
    x = np.random.default_rng(0).normal(100, 1, (10_000, 3)).astype(np.float32)
    moments = moments_of(np.split(x, 100), 3)
    np.testing.assert_allclose(moments.covariance(), np.cov(x.T.astype(np.float64)), rtol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_and_leave_no_trace(bad):
    moments = Moments(2)
    moments.update(torch.eye(2))
    features = torch.zeros(5, 2)
    features[3, 1] = bad
    with pytest.raises(FloatingPointError, match="1 of 5"):
        moments.update(features)
    assert moments.n == 2
    assert torch.isfinite(moments.covariance()).all()


def test_wrong_shapes_and_too_few_samples_are_refused():
    moments = Moments(3)
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        moments.update(torch.zeros(2, 4))
    moments.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2"):
        moments.covariance()
