from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from improved_diffusion.diffusion.noise import PerSampleNoise, seeded_generator

SHAPE = (3, 8, 8)
keys = st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 100), st.integers(0, 10**6)), min_size=1, max_size=6)


def draws(batch: list[tuple[int, int, int]], n: int = 3) -> torch.Tensor:
    noise = PerSampleNoise(batch, SHAPE, "cpu")
    return torch.stack([noise() for _ in range(n)], dim=1)


@given(keys, st.randoms())
def test_noise_of_a_sample_does_not_depend_on_its_batch(batch, random):
    together = draws(batch)
    order = list(range(len(batch)))
    random.shuffle(order)
    shuffled = draws([batch[i] for i in order])
    assert torch.equal(shuffled, together[order])
    half = len(batch) // 2
    for part in (slice(None, half), slice(half, None)):
        if batch[part]:
            assert torch.equal(draws(batch[part]), together[part])


def test_different_keys_and_draws_give_different_noise():
    batch = [(seed, label, number) for seed in range(4) for label in range(4) for number in range(20)]
    noise = draws(batch).flatten(0, 1).flatten(1)
    assert len(torch.unique(noise, dim=0)) == len(noise)
    correlation = np.corrcoef(noise.numpy())[np.triu_indices(len(noise), 1)]
    # Independent vectors of 192 numbers correlate as N(0, 1 / 192); the largest of 460 000 stays below 6 sigma.
    assert np.abs(correlation).max() < 6 / 192**0.5
    assert correlation.std() == pytest.approx(192**-0.5, rel=0.02)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=3), st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_a_longer_key_is_another_key(key, more):
    """Also where the key goes on with zeros: (seed, step) is not (seed, step, 0)."""
    assert seeded_generator(*key).initial_seed() != seeded_generator(*key, *more).initial_seed()


def test_generator_is_a_function_of_its_key():
    first, second = (torch.randn(5, generator=seeded_generator(7, 2)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.randn(5, generator=seeded_generator(2, 7)))


def test_noise_is_standard_normal():
    noise = PerSampleNoise([(0, 0, number) for number in range(200)], SHAPE, "cpu")()
    assert noise.shape == (200, *SHAPE)
    assert noise.dtype == torch.float32
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert kstest(noise[:, 0, 0, 0].numpy(), "norm").pvalue > 1e-3  # over samples, too
