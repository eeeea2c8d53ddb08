from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from improved_diffusion.diffusion.denoiser import NetworkDenoiser
from improved_diffusion.diffusion.process import RectifiedFlow
from improved_diffusion.diffusion.samplers import SAMPLERS
from improved_diffusion.diffusion.schedule import (
    SCHEDULES,
    NoiseSchedule,
    cosine_schedule,
    evenly_spaced,
    linear_schedule,
    of_betas,
    respace,
)


def names():
    return st.sampled_from(sorted(SCHEDULES))


@st.composite
def schedules_and_subsets(draw):
    timesteps = draw(st.integers(1, 300))
    name = draw(names())
    subset = sorted(draw(st.sets(st.integers(0, timesteps - 1), min_size=1)))
    return SCHEDULES[name](timesteps), subset


@pytest.mark.parametrize("timesteps", [1, 2, 5, 200, 1000, 4000])
def test_cosine_betas(timesteps):
    def abar(t):
        return math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [min(1 - abar(i + 1) / abar(i), 0.999) for i in range(timesteps)]
    betas = cosine_schedule(timesteps).betas
    assert betas.dtype == torch.float64
    np.testing.assert_allclose(betas, expected, rtol=1e-9)
    capped = np.isclose(betas, 0.999, rtol=1e-12, atol=0)
    assert capped.nonzero()[0].tolist() == [timesteps - 1]  # only the last


@pytest.mark.parametrize(("timesteps", "last"), [(1000, 2.43e-9), (200, 6.07e-8)])
def test_cosine_ends_in_published_noise_level(timesteps, last):
    assert cosine_schedule(timesteps).alphas_cumprod[-1].item() == pytest.approx(last, rel=2e-3)
    assert cosine_schedule(timesteps).betas[-2].item() == pytest.approx(0.75, abs=2e-3)


def test_linear_betas_are_those_of_ddpm():
    np.testing.assert_allclose(linear_schedule(1000).betas, np.linspace(1e-4, 0.02, 1000), rtol=1e-12)


@pytest.mark.parametrize("timesteps", [2, 5, 19, 20, 100, 250, 4000])
def test_linear_schedule_ends_in_noise_for_any_length(timesteps):
    schedule = linear_schedule(timesteps)
    assert schedule.betas.max() <= 0.999 * (1 + 1e-12)
    assert schedule.alphas_cumprod[-1] < 1e-3
    if timesteps >= 100:  # the integral of beta is that of T = 1000
        expected = linear_schedule(1000).betas.sum().item()
        assert schedule.betas.sum().item() == pytest.approx(expected, rel=1e-9)


@given(names(), st.integers(1, 400))
def test_marginals_are_those_of_the_markov_chain(name, timesteps):
    schedule = SCHEDULES[name](timesteps)
    mean, variance, means, variances = 1.0, 0.0, [], []
    for beta in schedule.betas.tolist():  # x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) noise
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        means.append(mean)
        variances.append(variance)
    np.testing.assert_allclose(schedule.alphas_cumprod.sqrt(), means, rtol=1e-9)
    np.testing.assert_allclose(1 - schedule.alphas_cumprod, variances, rtol=1e-9)
    np.testing.assert_array_equal(schedule.alphas_cumprod_prev[1:], schedule.alphas_cumprod[:-1])
    assert schedule.alphas_cumprod_prev[0] == 1
    assert len(schedule) == timesteps == schedule.original_length
    assert schedule.original_timesteps.tolist() == list(range(timesteps))


@given(names(), st.integers(2, 300), st.data())
def test_posterior_follows_from_bayes(name, timesteps, data):
    """q(x_{t-1} | x_t, x_0) is the prior N(sqrt(abar') x_0, 1 - abar') times the likelihood of x_t: precisions add."""
    schedule = SCHEDULES[name](timesteps)
    t = data.draw(st.integers(1, timesteps - 1))
    x_start, x_t = data.draw(st.floats(-1, 1)), data.draw(st.floats(-4, 4))
    beta, abar_prev = schedule.betas[t].item(), schedule.alphas_cumprod[t - 1].item()
    precision = 1 / (1 - abar_prev) + (1 - beta) / beta
    information = math.sqrt(abar_prev) * x_start / (1 - abar_prev) + math.sqrt(1 - beta) * x_t / beta

    mean = schedule.posterior_mean_coef1[t] * x_start + schedule.posterior_mean_coef2[t] * x_t
    assert mean.item() == pytest.approx(information / precision, rel=1e-8, abs=1e-12)
    assert schedule.posterior_variance[t].item() == pytest.approx(1 / precision, rel=1e-8)
    assert schedule.posterior_log_variance[t].item() == pytest.approx(-math.log(precision), abs=1e-8)
    assert schedule.fixed_large_variance[t] == beta


@given(names(), st.integers(1, 300))
def test_variances_at_the_first_timestep(name, timesteps):
    schedule = SCHEDULES[name](timesteps)
    assert schedule.posterior_variance[0] == 0  # x_0 is known
    assert schedule.posterior_mean_coef1[0].item() == pytest.approx(1)
    assert schedule.posterior_mean_coef2[0] == 0
    stand_in = schedule.posterior_variance[1] if timesteps > 1 else schedule.betas[0]
    assert schedule.posterior_log_variance[0].item() == pytest.approx(stand_in.log().item())
    assert schedule.fixed_large_variance[0] == stand_in
    assert schedule.posterior_log_variance.isfinite().all()


@given(schedules_and_subsets())
def test_respaced_process_has_the_same_marginals(case):
    schedule, subset = case
    respaced = respace(schedule, subset)
    np.testing.assert_allclose(respaced.alphas_cumprod, schedule.alphas_cumprod[subset], rtol=1e-12)
    np.testing.assert_allclose(1 - respaced.alphas_cumprod, 1 - schedule.alphas_cumprod[subset], rtol=1e-9)
    # A long step is the product of the short ones between.
    for k, (start, end) in enumerate(zip([-1, *subset[:-1]], subset, strict=True)):
        kept = torch.prod(1 - schedule.betas[start + 1 : end + 1]).item()
        assert respaced.betas[k].item() == pytest.approx(1 - kept, rel=1e-9)


@given(schedules_and_subsets())
def test_network_is_told_the_original_timesteps(case):
    schedule, subset = case
    told = []

    def network(x_t, t, y):
        told.append(t)
        return torch.zeros_like(x_t)

    denoiser = NetworkDenoiser(network, "v", "fixed_large")
    level = respace(schedule, subset).at(torch.arange(len(subset)))
    denoiser(torch.zeros(len(subset), 1, 1, 1), level, None)
    assert told[0].is_floating_point()
    np.testing.assert_allclose(told[0], np.array(subset) * 1000 / len(schedule), rtol=1e-6)


@given(schedules_and_subsets(), st.data())
def test_respacing_twice_is_respacing_once(case, data):
    schedule, subset = case
    chosen = sorted(data.draw(st.sets(st.integers(0, len(subset) - 1), min_size=1)))
    twice, once = respace(respace(schedule, subset), chosen), respace(schedule, [subset[i] for i in chosen])
    assert twice.original_timesteps.tolist() == once.original_timesteps.tolist()
    assert twice.original_length == once.original_length == len(schedule)
    np.testing.assert_allclose(twice.betas, once.betas, rtol=1e-9)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_respacing_to_every_timestep_changes_nothing(name):
    schedule = SCHEDULES[name](200)
    same = respace(schedule, range(200))
    for table in ("betas", "posterior_mean_coef1", "posterior_mean_coef2", "posterior_log_variance"):
        np.testing.assert_allclose(getattr(same, table), getattr(schedule, table), rtol=1e-9, err_msg=table)
    assert same.original_timesteps.tolist() == list(range(200))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
@pytest.mark.parametrize("timesteps", [1, 2, 5, 1000])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_one_step(sampler, timesteps, name):
    """The one step from the last timestep lands on the predicted x_0, whichever sampler takes it."""
    schedule = respace(SCHEDULES[name](timesteps), evenly_spaced(timesteps, 1))
    told = []

    def network(x_t, t, y):
        told.extend(t.tolist())
        return torch.full_like(x_t, 0.25)

    denoiser = NetworkDenoiser(network, "x_start", "fixed_small")
    sample = sampler(denoiser, schedule, torch.randn(2, 3, 4, 4), None, lambda: torch.randn(2, 3, 4, 4))
    torch.testing.assert_close(sample, torch.full((2, 3, 4, 4), 0.25))
    assert told == pytest.approx([(timesteps - 1) * 1000 / timesteps] * len(told))


@pytest.mark.parametrize(
    "bad",
    [[], [-1, 2], [3, 10], [10], [2, 2], [3, 1], 4, [[1, 2]], [0.5, 2.0]],
    ids=lambda bad: str(bad).replace(" ", ""),
)
def test_respacing_rejects_timesteps_that_do_not_fit(bad):
    with pytest.raises(ValueError, match="increasing timesteps, integers from 0 to 9"):
        respace(cosine_schedule(10), bad)


@given(st.integers(1, 1200), st.data())
def test_evenly_spaced(length, data):
    steps = data.draw(st.integers(1, length))
    spaced = evenly_spaced(length, steps)
    assert len(spaced) == steps
    assert spaced[-1] == length - 1
    gaps = np.diff(spaced)
    if steps > 1:
        assert spaced[0] == 0
        assert gaps.min() >= 1
        assert gaps.max() - gaps.min() <= 2  # rounding moves either end by at most one half
        ideal = np.linspace(0, length - 1, steps)
        assert np.abs(spaced - ideal).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_evenly_spaced_rejects_impossible_numbers_of_steps(steps):
    with pytest.raises(ValueError, match="between 1 and 10"):
        evenly_spaced(10, steps)


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("timesteps", [0, -5])
def test_schedule_needs_a_timestep(make, timesteps):
    with pytest.raises(ValueError, match="at least 1"):
        make(timesteps)


@pytest.mark.parametrize("levels", [[], [0.5, 0.5], [0.5, 0.2], [float("nan")], [0.0, 1.0], [[0.1]]], ids=str)
def test_schedule_rejects_levels_without_increasing_noise(levels):
    with pytest.raises(ValueError, match="levels"):
        NoiseSchedule(RectifiedFlow(), torch.tensor(levels, dtype=torch.float64))


def test_zero_terminal_signal_is_a_schedule():
    """A last beta of 1 leaves pure noise (for v or x_0 prediction): its posterior forgets x_t."""
    schedule = of_betas(torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64))
    assert schedule.betas[-1] == 1
    assert schedule.posterior_mean_coef2[-1] == 0
    assert schedule.posterior_variance[-1].item() == pytest.approx(1 - 0.9 * 0.5)


def test_moving_a_respaced_schedule_keeps_it():
    schedule = respace(cosine_schedule(100), [3, 40, 99])
    moved = schedule.to("cpu")
    assert moved.original_timesteps.tolist() == [3, 40, 99]
    assert moved.original_length == 100
    torch.testing.assert_close(moved.betas, schedule.betas, rtol=0, atol=0)
