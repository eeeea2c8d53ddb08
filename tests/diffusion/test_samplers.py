from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from improved_diffusion.diffusion.denoiser import ClippedDenoiser, NetworkDenoiser
from improved_diffusion.diffusion.samplers import SAMPLERS, ancestral, ddim, dpmpp_2m, heun
from improved_diffusion.diffusion.schedule import SCHEDULES, cosine_schedule, evenly_spaced, respace, sampling_schedule

MEAN, STD = 0.3, 0.25  # of the analytic data


def walked(sampler, name: str, steps: int, timesteps: int = 1000):
    """The grid on which that sampler is used: Heun's method needs one without the last, almost signalless levels."""
    return sampling_schedule(SCHEDULES[name](timesteps).process, steps, "karras" if sampler is heun else "uniform")


every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


def gaussian_noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=dtype)


def impulse_response(sampler, denoiser) -> tuple[float, float]:
    """Mean and standard deviation of the samples, exactly, where the denoiser is affine in x_t.

    The sample is then an affine function of x_T and of every noise drawn: one batch feeds a unit of each, alone, and
    reads the gains; the variances of independent standard normals add.
    """
    sources = 2 * len(denoiser.schedule) + 2
    units = iter(torch.eye(sources + 1, sources, dtype=torch.float64).T.reshape(sources, -1, 1, 1, 1))
    samples = sampler(denoiser, denoiser.schedule, next(units), None, lambda: next(units)).flatten()
    offset = samples[-1]  # the row that was fed nothing
    return offset.item(), (samples[:-1] - offset).norm().item()


@every_sampler
@pytest.mark.parametrize("steps", [1000, 200])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_perfect_denoiser_gives_back_its_distribution(sampler, steps, name, analytic_gaussian):
    schedule = walked(sampler, name, steps)
    denoiser, n = analytic_gaussian(schedule, MEAN, STD), 20_000
    draw_noise = gaussian_noise(n, 1, 1, 1)
    samples = sampler(denoiser, schedule, draw_noise(), None, draw_noise)
    discretization = 6 / steps  # of a first-order method
    assert samples.mean().item() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(n) + 0.002)
    assert samples.std().item() == pytest.approx(STD, rel=4 / math.sqrt(2 * n) + discretization)


@pytest.mark.parametrize("sampler", [ancestral, ddim, dpmpp_2m])
def test_more_steps_are_closer(sampler, analytic_gaussian):
    errors = []
    for steps in (10, 50, 250, 1000):
        schedule = walked(sampler, "cosine", steps)
        _, std = impulse_response(sampler, analytic_gaussian(schedule, MEAN, STD))
        errors.append(abs(std - STD))
    assert errors == sorted(errors, reverse=True) or max(errors) < 1e-3 * STD  # or exact from the start
    assert errors[-1] < 0.005 * STD


def test_ddpm_like_ddim_gives_back_the_distribution(analytic_gaussian):
    """At eta = 1 its variance is beta~, that of a known x_0: too small, by an error that halves with the steps."""
    errors = []
    for steps in (125, 250, 500, 1000):
        schedule = respace(cosine_schedule(1000), evenly_spaced(1000, steps))
        mean, std = impulse_response(partial(ddim, eta=1.0), analytic_gaussian(schedule, MEAN, STD))
        assert mean == pytest.approx(MEAN, abs=1e-3)
        errors.append(STD - std)
    assert errors[-1] < 0.01 * STD
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2, rtol=0.1)


@st.composite
def respaced_schedules(draw):
    subset = sorted(draw(st.sets(st.integers(0, 99), min_size=1)))
    return respace(SCHEDULES[draw(st.sampled_from(["cosine", "linear"]))](100), subset)


@given(respaced_schedules(), st.floats(-0.5, 0.5), st.floats(0.05, 2))
def test_ancestral_is_exact_for_any_steps(analytic_gaussian, schedule, mean, std):
    """With the exact reverse variance, every x_t is distributed as it should be. The sample is E[x_0 | x_1], of
    variance abar_1 std^4 / Var[x_1], and remembers by its regression on x_T that x_T was drawn from N(0, 1)."""
    denoiser = analytic_gaussian(schedule, mean, std)
    first, last = schedule.alphas_cumprod[0].item(), schedule.alphas_cumprod[-1].item()
    variance_first, variance_last = first * std**2 + 1 - first, last * std**2 + 1 - last
    memory = math.sqrt(last) * std**2 / variance_last
    expected_mean = mean - memory * math.sqrt(last) * mean
    expected_variance = first * std**4 / variance_first + memory**2 * (1 - variance_last)
    assert impulse_response(ancestral, denoiser) == pytest.approx((expected_mean, expected_variance**0.5), rel=1e-6)


@given(respaced_schedules(), st.floats(-0.5, 0.5), st.floats(0.05, 2))
def test_ddim_errs_by_the_angles_that_it_cuts(analytic_gaussian, schedule, mean, std):
    """(signal std, noise std) = r_t (cos theta_t, sin theta_t). The exact flow carries a deviation from the mean along
    as r_t does; a DDIM step projects it instead, which costs the cosine of the step's angle."""
    denoiser = analytic_gaussian(schedule, mean, std)
    abar = np.append(1.0, schedule.alphas_cumprod)
    angles = np.arctan2(np.sqrt(1 - abar), np.sqrt(abar) * std)
    last = abar[-1].item()
    gain = std / math.sqrt(last * std**2 + 1 - last) * np.prod(np.cos(np.diff(angles)))
    expected_mean = mean - gain * math.sqrt(last) * mean  # for x_T is centred at 0, not at sqrt(abar_T) mean
    assert impulse_response(ddim, denoiser) == pytest.approx((expected_mean, gain), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_keeps_the_marginals_for_every_eta(eta):
    """Where x_0 is known, every x_t is N(sqrt(abar_t) x_0, 1 - abar_t), if x_T is (Song et al. 2020, lemma 1), of
    which the last draw made up sigma^2 = eta^2 (1 - abar_t) / (1 - abar_{t+1}) (1 - abar_{t+1} / abar_t)."""
    schedule, x_start = respace(cosine_schedule(1000), evenly_spaced(1000, 20)), 0.6
    seen = {}

    def denoiser(x_t, level, y):
        seen[schedule.levels.tolist().index(level.t.item())] = x_t.flatten()
        return known.interpret(x_t, level, torch.full_like(x_t, x_start), None)

    known = NetworkDenoiser(lambda *_: None, "x_start", "fixed_small")
    last = schedule.alphas_cumprod[-1]
    units = iter(torch.eye(22, 21, dtype=torch.float64).T.reshape(21, -1, 1, 1, 1))
    x_T = last.sqrt() * x_start + (1 - last).sqrt() * next(units)
    samples = ddim(denoiser, schedule, x_T, None, lambda: next(units), eta=eta)
    for t, x_t in seen.items():
        abar = schedule.alphas_cumprod[t].item()
        assert x_t[-1].item() == pytest.approx(math.sqrt(abar) * x_start)
        gains = x_t[:-1] - x_t[-1]
        assert gains.square().sum().item() == pytest.approx(1 - abar)
        if t < 19:
            later = schedule.alphas_cumprod[t + 1].item()
            sigma = eta * math.sqrt((1 - abar) / (1 - later) * (1 - later / abar))
            assert gains[19 - t].item() == pytest.approx(sigma)
    torch.testing.assert_close(samples, torch.full_like(samples, x_start))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3, 25, 100])
def test_ddim_at_eta_1_is_ancestral_with_the_small_variance(steps, clip):
    schedule = respace(cosine_schedule(100), evenly_spaced(100, steps))
    denoiser = NetworkDenoiser(lambda x_t, t, y: torch.sin(3 * x_t), "v", "fixed_small")
    denoiser = ClippedDenoiser(denoiser) if clip else denoiser
    x_T = gaussian_noise(2, 3, 4, 4, seed=1)()
    samples = [
        sampler(denoiser, schedule, x_T, None, gaussian_noise(2, 3, 4, 4, seed=2))
        for sampler in (ancestral, partial(ddim, eta=1.0))
    ]
    torch.testing.assert_close(samples[0], samples[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("sampler", [*SAMPLERS.values(), partial(ddim, eta=1.0)], ids=[*SAMPLERS, "ddim-eta-1"])
def test_float32_is_enough_for_any_number_of_steps(sampler, name):
    """Long steps leave differences of nearly equal coefficients; these must not be taken in float32."""

    def sample(denoiser, dtype):
        draw_noise = gaussian_noise(4, 3, 4, 4)
        return sampler(
            ClippedDenoiser(denoiser), schedule, draw_noise().to(dtype), None, lambda: draw_noise().to(dtype)
        )

    for steps in range(1, 13):
        schedule = walked(sampler, name, steps)
        denoiser = NetworkDenoiser(lambda x_t, t, y: 0.9 * x_t, "eps", "fixed_small")
        single, double = sample(denoiser, torch.float32), sample(denoiser, torch.float64)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=0, atol=2e-3)


@every_sampler
def test_predictions_are_clipped_to_the_range_of_images(sampler):
    denoiser = NetworkDenoiser(lambda x_t, t, y: torch.full_like(x_t, 5), "x_start", "fixed_small")
    draw_noise = gaussian_noise(2, 3, 4, 4)
    clipped = sampler(ClippedDenoiser(denoiser), cosine_schedule(10), draw_noise(), None, draw_noise)
    free = sampler(denoiser, cosine_schedule(10), draw_noise(), None, draw_noise)
    torch.testing.assert_close(clipped, torch.ones_like(clipped))
    torch.testing.assert_close(free, torch.full_like(free, 5))


@every_sampler
def test_sampler_visits_the_timesteps_and_hands_on_the_classes(sampler):
    visited, classes = [], []

    def network(x_t, t, y):
        assert t.shape == (2,)
        visited.append(t.tolist())
        classes.append(y)
        return x_t

    y = torch.tensor([4, 2])
    schedule = respace(cosine_schedule(1000), [9, 500, 999])
    x_T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    before = x_T.clone()
    network_parameter = torch.ones((), requires_grad=True)
    sample = sampler(
        NetworkDenoiser(lambda *a: network(*a) * network_parameter, "eps", "fixed_large"),
        schedule,
        x_T,
        y,
        gaussian_noise(2, 3, 4, 4, dtype=torch.float32),
    )
    order = [t for i, t in enumerate(visited) if i == 0 or t != visited[i - 1]]
    assert order == [[999, 999], [500, 500], [9, 9]]
    assert all(given is y for given in classes)
    assert sample.shape == x_T.shape
    assert sample.dtype == torch.float32
    assert not sample.requires_grad
    assert torch.equal(x_T, before)


def test_noise_is_drawn_only_where_it_is_needed():
    schedule = cosine_schedule(7)
    denoiser = NetworkDenoiser(lambda x_t, t, y: x_t, "v", "fixed_small")
    x_T = torch.zeros(1, 1, 1, 1)
    ratios = (schedule.sigma / schedule.signal).tolist()
    churned = sum(0.1 <= ratio <= 1 for ratio in ratios)
    assert 0 < churned < 7
    expected_draws = [(ancestral, 6), (ddim, 0), (partial(ddim, eta=0.5), 6), (heun, 0)]
    expected_draws += [(partial(heun, churn=7, churn_min=0.1, churn_max=1), churned)]
    expected_draws += [(dpmpp_2m, 0), (partial(dpmpp_2m, eta=1.0), 6)]
    for sampler, expected in expected_draws:
        draws = []
        sampler(denoiser, schedule, x_T, None, lambda draws=draws: draws.append(1) or torch.zeros(1, 1, 1, 1))
        assert len(draws) == expected


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
@pytest.mark.parametrize("sampler", [ddim, dpmpp_2m])
def test_eta_out_of_range(sampler, eta):
    denoiser = NetworkDenoiser(lambda x_t, t, y: x_t, "v", "fixed_small")
    with pytest.raises(ValueError, match="eta must be between 0 and 1"):
        sampler(denoiser, cosine_schedule(3), torch.zeros(1, 1, 1, 1), None, lambda: torch.zeros(1, 1, 1, 1), eta=eta)
