from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from torch.distributions import Normal, kl_divergence

from improved_diffusion.diffusion.likelihood import (
    discretized_gaussian_log_likelihood,
    gaussian_kl,
    to_bits_per_dim,
)

means = st.floats(-3, 3)
log_variances = st.floats(-12, 3)
LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def scalar(value: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor([value], dtype=dtype)


def scipy_log_mass(level: int, mean: float, std: float) -> float:
    """log of the mass between the borders of a grey level, from whichever tail is smaller."""
    low = -math.inf if level == 0 else ((level - 0.5) / 127.5 - 1 - mean) / std
    high = math.inf if level == 255 else ((level + 0.5) / 127.5 - 1 - mean) / std
    if low > 0:
        low, high = -high, -low
    log_high, log_low = norm.logcdf(high), norm.logcdf(low)
    return log_high + np.log(-np.expm1(log_low - log_high))


@given(means, log_variances, means, log_variances)
def test_kl_is_that_of_torch_distributions(mean1, log_variance1, mean2, log_variance2):
    kl = gaussian_kl(scalar(mean1), scalar(log_variance1), scalar(mean2), scalar(log_variance2)).item()
    expected = kl_divergence(
        Normal(scalar(mean1), scalar(math.exp(log_variance1 / 2))),
        Normal(scalar(mean2), scalar(math.exp(log_variance2 / 2))),
    ).item()
    assert kl == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert kl >= 0


def test_kl_is_the_expected_log_ratio():
    samples = norm.rvs(0.3, 0.5, size=400_000, random_state=0)
    log_ratio = norm.logpdf(samples, 0.3, 0.5) - norm.logpdf(samples, -0.2, 0.8)
    kl = gaussian_kl(scalar(0.3), scalar(2 * math.log(0.5)), scalar(-0.2), scalar(2 * math.log(0.8))).item()
    assert kl == pytest.approx(log_ratio.mean(), abs=5 * log_ratio.std() / math.sqrt(len(samples)))


@pytest.mark.parametrize("difference", [1e-1, 1e-2, 1e-3])
def test_kl_of_close_variances_keeps_its_digits_in_float32(difference):
    """At large t the posterior and the model differ so little that exp(r) - 1 - r would be rounding error."""
    zero, log_variance = scalar(0, torch.float32), scalar(-1.0, torch.float32)
    other = log_variance + difference
    ratio = (other.double() - log_variance.double()).item()
    expected = (ratio**2 / 2 + ratio**3 / 6 + ratio**4 / 24 + ratio**5 / 120) / 2
    assert gaussian_kl(zero, other, zero, log_variance).item() == pytest.approx(expected, rel=2e-4)


@given(st.integers(0, 255), st.floats(-1.5, 1.5), st.floats(-6, 1))
def test_discretized_likelihood_is_the_mass_of_the_grey_level(level, mean, log_std):
    log_likelihood = discretized_gaussian_log_likelihood(LEVELS[[level]], scalar(mean), scalar(2 * log_std)).item()
    assert log_likelihood == pytest.approx(scipy_log_mass(level, mean, math.exp(log_std)), rel=1e-8, abs=1e-9)


def test_discretized_likelihood_is_the_integral_of_the_density():
    mean, std = 0.1, 0.05
    points = np.linspace(-1 / 255, 1 / 255, 2001)
    for level in (100, 140, 147):
        mass = np.trapezoid(norm.pdf(LEVELS[level].item() + points, mean, std), points)
        log_likelihood = discretized_gaussian_log_likelihood(LEVELS[[level]], scalar(mean), scalar(2 * math.log(std)))
        assert log_likelihood.exp().item() == pytest.approx(mass, rel=1e-6)


@given(st.floats(-1.5, 1.5), st.floats(-7, 2), st.sampled_from([torch.float32, torch.float64]))
def test_grey_levels_share_the_whole_mass(mean, log_std, dtype):
    x = LEVELS.to(dtype)
    log_likelihood = discretized_gaussian_log_likelihood(x, torch.full_like(x, mean), torch.full_like(x, 2 * log_std))
    assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=2e-3 if dtype == torch.float32 else 1e-9)
    assert (log_likelihood <= 0).all()


@pytest.mark.parametrize("std", [0.005, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("mean", [-1.2, -0.5, 0.0, 0.37, 0.99])
def test_float32_keeps_digits_on_both_sides_of_the_mean(mean, std):
    """Every level, from the one at the mean to those a hundred standard deviations below and above it."""
    x = LEVELS.float()
    mean32, log_variance32 = torch.full_like(x, mean), torch.full_like(x, 2 * math.log(std))
    log_likelihood = discretized_gaussian_log_likelihood(x, mean32, log_variance32)
    std32 = math.exp(log_variance32[0].item() / 2)
    expected = np.array([scipy_log_mass(level, mean32[0].item(), std32) for level in range(256)])
    np.testing.assert_allclose(log_likelihood, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("level", [0, 1, 60, 130, 140, 141, 200, 254, 255])
def test_gradients_are_those_of_the_mass_in_float32_however_far_the_level(level):
    mean, log_std, step = 0.1, math.log(0.03), 1e-5
    at = torch.tensor([mean], requires_grad=True)
    log_variance = torch.tensor([2 * log_std], requires_grad=True)
    discretized_gaussian_log_likelihood(LEVELS[[level]].float(), at, log_variance).sum().backward()
    right, left = (scipy_log_mass(level, mean + h, math.exp(log_std)) for h in (step, -step))
    wider, narrower = (scipy_log_mass(level, mean, math.exp(log_std + h / 2)) for h in (step, -step))
    assert at.grad.item() == pytest.approx((right - left) / (2 * step), rel=1e-3)
    assert log_variance.grad.item() == pytest.approx((wider - narrower) / (2 * step), rel=1e-3)


def test_bits_per_dim():
    nats = torch.full((2, 3, 4, 4), math.log(2))
    nats[1] *= 8  # -log of 1/256 is 8 bits
    torch.testing.assert_close(to_bits_per_dim(nats), torch.tensor([1.0, 8.0]))
    uniform = torch.full((1, 3, 2, 2), -math.log(256))
    assert to_bits_per_dim(-uniform).item() == pytest.approx(8)
