from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from improved_diffusion.diffusion.noise import NOISES, PhiloxNoise, philox4x32, seeded_generator

SHAPE = (3, 8, 8)
keys = st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 100), st.integers(0, 10**6)), min_size=1, max_size=6)
every_noise = pytest.mark.parametrize("name", NOISES)


def draws(name: str, batch: list[tuple[int, int, int]], n: int = 3) -> torch.Tensor:
    noise = NOISES[name](batch, SHAPE, "cpu")
    return torch.stack([noise() for _ in range(n)], dim=1)


@every_noise
@given(batch=keys, random=st.randoms())
def test_noise_of_a_sample_does_not_depend_on_its_batch(name, batch, random):
    together = draws(name, batch)
    order = list(range(len(batch)))
    random.shuffle(order)
    shuffled = draws(name, [batch[i] for i in order])
    assert torch.equal(shuffled, together[order])
    half = len(batch) // 2
    for part in (slice(None, half), slice(half, None)):
        if batch[part]:
            assert torch.equal(draws(name, batch[part]), together[part])


@every_noise
def test_different_keys_and_draws_give_different_noise(name):
    batch = [(seed, label, number) for seed in range(4) for label in range(4) for number in range(20)]
    noise = draws(name, batch).flatten(0, 1).flatten(1)
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


@every_noise
def test_noise_is_standard_normal(name):
    noise = NOISES[name]([(0, 0, number) for number in range(200)], SHAPE, "cpu")()
    assert noise.shape == (200, *SHAPE)
    assert noise.dtype == torch.float32
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert kstest(noise[:, 0, 0, 0].numpy(), "norm").pvalue > 1e-3  # over samples, too
    pairs = noise.flatten(1).unflatten(1, (-1, 2))  # Box and Muller's two normals of one pair of words are independent
    assert np.corrcoef(pairs.flatten(0, 1).T.numpy())[0, 1] == pytest.approx(0, abs=4 / pairs[..., 0].numel() ** 0.5)


ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # counter, key, result: Random123's kat_vectors
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, words):
    result = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, result)) == words


def test_philox_noise_is_what_its_formula_says():
    """Of one number, from the generator's words; and the noise of the last possible key is like any other."""
    key, number = (5 + (7 << 32), 3, 11), 4 * 9 + 2
    noise = PhiloxNoise([key], (1, 8, 8), "cpu")
    noise()
    second = noise().flatten()[number]
    counter = tuple(map(torch.tensor, (9, 1, 11, 3)))
    words = [int(word) for word in philox4x32(counter, (torch.tensor(5), torch.tensor(7)))]
    radius = np.sqrt(-2 * np.log((words[2] + 0.5) / 2**32))
    assert float(second) == pytest.approx(radius * np.cos(2 * np.pi * (words[3] + 0.5) / 2**32), rel=1e-6)
    assert abs(float(PhiloxNoise([(2**64 - 1, ONES, ONES)], (3, 64, 64), "cpu")().std()) - 1) < 0.05


@pytest.mark.parametrize("key", [(2**64, 0, 0), (0, 2**32, 0), (0, 0, 2**32)])
def test_philox_has_no_room_for_larger_keys(key):
    with pytest.raises(ValueError, match="too large"):
        PhiloxNoise([key], SHAPE, "cpu")
