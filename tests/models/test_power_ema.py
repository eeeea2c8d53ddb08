"""Averages of any length from a few that were kept (Karras et al. 2023)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from torch import nn

from improved_diffusion.models.power_ema import PowerFunctionEMA, Profile, blend, exponent, overlap


def shares(profile: Profile, tau: np.ndarray) -> np.ndarray:
    """What a profile gives to each moment: a density on [0, profile.steps]."""
    gamma = exponent(profile.length)
    inside = (gamma + 1) * np.minimum(tau / profile.steps, 1) ** gamma / profile.steps
    return np.where(tau <= profile.steps, inside, 0.0)


@given(length=st.floats(0.01, 0.28))
@settings(max_examples=30, deadline=None)
def test_the_exponent_has_the_length_as_its_relative_deviation(length):
    gamma = exponent(length)
    moments = [integrate.quad(lambda u, k=k: (gamma + 1) * u ** (gamma + k), 0, 1)[0] for k in (0, 1, 2)]
    assert moments[0] == pytest.approx(1)
    assert np.sqrt(moments[2] - moments[1] ** 2) == pytest.approx(length, rel=1e-5)


def test_known_exponents():
    """EDM2: sigma_rel 0.05 is gamma 16.97, 0.10 is 6.94 (section 3.1)."""
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)


@given(
    a=st.tuples(st.integers(1, 1000), st.floats(0.03, 0.25)), b=st.tuples(st.integers(1, 1000), st.floats(0.03, 0.25))
)
@settings(max_examples=20, deadline=None)
def test_overlaps_are_integrals(a, b):
    a, b = Profile(*a), Profile(*b)
    end = min(a.steps, b.steps)
    expected = integrate.quad(lambda tau: float(shares(a, tau) * shares(b, tau)), 0, end, epsabs=0)[0]
    assert overlap(a, b) == pytest.approx(expected, rel=1e-4)
    assert overlap(a, b) == overlap(b, a)


def test_the_average_is_the_sum_that_its_shares_say():
    """After t steps the weights of step tau count in proportion to tau^gamma, up to the discretization."""
    linear, length, steps = nn.Linear(1, 1, bias=False), 0.1, 400
    ema = PowerFunctionEMA({"weight": linear.weight}, (length,))
    walk = torch.randn(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(0)
    for step in range(steps):
        with torch.no_grad():
            linear.weight.fill_(float(walk[step]))
        ema.update(step)
    weights = torch.arange(1, steps + 1, dtype=torch.float64) ** exponent(length)
    expected = float((weights * walk).sum() / weights.sum())
    assert float(ema.weights(length)["weight"]) == pytest.approx(expected, abs=0.02 * float(walk.std()))


@pytest.mark.parametrize("length", [0.04, 0.075, 0.15, 0.2])
def test_any_length_can_be_made_of_two_kept_now_and_then(length):
    """Sixteen snapshots of 0.05 and 0.1 give another length nearly as if it had been tracked."""
    linear, steps, every = nn.Linear(64, 1, bias=False), 3200, 200
    kept_lengths = (0.05, 0.1)
    ema = PowerFunctionEMA({"weight": linear.weight}, (*kept_lengths, length))
    generator, kept, averages = torch.Generator().manual_seed(0), [], []
    for step in range(steps):
        with torch.no_grad():
            linear.weight.add_(torch.randn(1, 64, generator=generator))
        ema.update(step)
        if (step + 1) % every == 0:
            kept += [Profile(step + 1, kept_length) for kept_length in kept_lengths]
            averages += [ema.weights(kept_length)["weight"].half().double() for kept_length in kept_lengths]
    made = sum(factor * average for factor, average in zip(blend(kept, Profile(steps, length)), averages, strict=True))
    tracked = ema.weights(length)["weight"].double()
    nearest = min(float((ema.weights(k)["weight"] - tracked).norm()) for k in kept_lengths)
    assert float((made - tracked).norm()) < 0.05 * nearest


def test_a_kept_average_is_itself():
    kept = [Profile(steps, length) for steps in (100, 200, 300) for length in (0.05, 0.1)]
    for index, profile in enumerate(kept):
        np.testing.assert_allclose(blend(kept, profile), np.eye(len(kept))[index], atol=1e-5)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.2887, 1.0])
def test_absurd_lengths_are_refused(length):
    with pytest.raises(ValueError, match="relative length"):
        exponent(length)
