"""Every process at every level, and what follows from signal and sigma alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from improved_diffusion.diffusion.denoiser import NetworkDenoiser
from improved_diffusion.diffusion.objective import LEAST_DIVISOR, MOST_FACTOR, WEIGHTINGS, Objective
from improved_diffusion.diffusion.parameterization import PARAMETERIZATIONS, combine, determinant, q_sample, resolve
from improved_diffusion.diffusion.process import PROCESSES
from improved_diffusion.diffusion.schedule import (
    SCHEDULES,
    SPACINGS,
    NoiseSchedule,
    cosine_schedule,
    linear_schedule,
    respace,
    sampling_schedule,
)

ALL_PROCESSES = {**{name: make() for name, make in PROCESSES.items()}, "200 steps": cosine_schedule(200).process}
every_process = pytest.mark.parametrize("process", ALL_PROCESSES.values(), ids=ALL_PROCESSES.keys())
levels = st.floats(0.001, 0.999)


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@every_process
def test_noise_grows_from_the_image_to_the_last_level(process):
    at = process.at(torch.linspace(0, process.last_level, 1000, dtype=torch.float64))
    assert at.signal[0] == pytest.approx(1)
    assert at.sigma[0] == pytest.approx(0, abs=0.002)
    assert (at.noise_to_signal.diff() > 0).all()
    if not math.isclose(at.sigma[-1], 80):  # but for the one that explodes
        assert (at.sigma <= 1 + 1e-12).all()


@pytest.mark.parametrize("name", ["cosine", "linear"])
@given(t=levels)
def test_variance_is_preserved(name, t):
    level = ALL_PROCESSES[name].at(number(t))
    assert level.signal.item() ** 2 + level.sigma.item() ** 2 == pytest.approx(1, abs=1e-12)


@given(levels)
def test_linear_in_continuous_time_is_its_integral(t):
    """abar = exp(-the integral of beta)."""
    integral, _ = quad(lambda u: 0.1 + 19.9 * u, 0, t)
    assert ALL_PROCESSES["linear"].at(number(t)).signal.item() ** 2 == pytest.approx(math.exp(-integral), rel=1e-9)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_grids_of_more_and_more_steps_tend_to_the_process_in_continuous_time(name):
    errors = []
    for timesteps in (100, 1000, 10_000):
        schedule = SCHEDULES[name](timesteps)
        kept = torch.arange(timesteps // 10 - 1, timesteps - 1, timesteps // 10)
        exact = ALL_PROCESSES[name].at(schedule.levels[kept])
        errors.append(float((schedule.signal[kept] - exact.signal).abs().max()))
    assert errors[-1] < 1e-4
    assert name == "cosine" or errors[0] > 5 * errors[1] > 25 * errors[2]  # cosine is sampled, and exact at once


@every_process
@given(t=levels)
def test_level_of_inverts_the_noise(process, t):
    level = process.at(number(t * process.last_level))
    assert process.level_of(level.noise_to_signal).item() == pytest.approx(level.t.item(), abs=1e-9)


@every_process
@pytest.mark.parametrize("ratio", [0.0, 1e-9, 1e9, math.inf])
def test_levels_of_impossible_noise_are_the_nearest(process, ratio):
    t = process.level_of(number(ratio)).item()
    assert t == pytest.approx(0 if ratio < 1 else 1, abs=1e-5)


@given(st.floats(0.001, 1), st.integers(1, 50))
def test_between_its_steps_a_table_stays_between_their_noise(t, timesteps):
    schedule = cosine_schedule(timesteps)
    ratio = schedule.process.at(number(t)).noise_to_signal.item()
    of_steps = np.append(0, schedule.sigma / schedule.signal)
    below = min(int(t * timesteps), timesteps)
    assert of_steps[below] * (1 - 1e-4) <= ratio <= of_steps[min(below + 1, timesteps)] * (1 + 1e-4)


def test_a_table_is_itself_at_its_steps():
    schedule = linear_schedule(7)
    at = schedule.process.at(torch.arange(1, 8, dtype=torch.float64) / 7)
    assert torch.equal(at.signal, schedule.signal)
    torch.testing.assert_close(at.timestep * 7, torch.arange(7, dtype=torch.float64))


@every_process
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@given(t=levels, x_start=st.floats(-1, 1), noise=st.floats(-4, 4))
def test_every_parameterization_gives_back_x_start_and_eps(process, name, t, x_start, noise):
    level = process.at(number(t * process.last_level))
    x_start, noise = (number(value).view(1, 1, 1, 1) for value in (x_start, noise))
    x_t = q_sample(level, x_start, noise)
    known = resolve(name, level, x_t, combine(name, level, x_start, noise))
    ill = 1e-13 * (1 + level.noise_to_signal.item() + 1 / level.noise_to_signal.item())
    torch.testing.assert_close(known[0], x_start, rtol=0, atol=ill)
    torch.testing.assert_close(known[1], noise, rtol=0, atol=ill)


@given(t=levels, x_start=st.floats(-1, 1), noise=st.floats(-4, 4))
def test_velocity_is_that_of_a_rectified_flow(t, x_start, noise):
    t = number(t).requires_grad_()
    level = ALL_PROCESSES["flow"].at(t)
    (velocity,) = torch.autograd.grad(level.signal * x_start + level.sigma * noise, t)
    combined = combine("velocity", level, number(x_start).view(1, 1), number(noise).view(1, 1))
    assert combined.item() == pytest.approx(velocity.item())


@given(st.floats(-4.0, 4.0), st.floats(-1, 1), st.floats(-4, 4))
def test_edm_is_the_preconditioning_of_its_paper(log_sigma, x_start, noise):
    """x_0 = c_skip x + c_out F (arXiv:2206.00364, equation 7 and table 1)."""
    sigma = math.exp(log_sigma)
    level = ALL_PROCESSES["ve"].at(ALL_PROCESSES["ve"].level_of(number(sigma)))
    x = x_start + sigma * noise
    F = combine("edm", level, number(x_start).view(1, 1), number(noise).view(1, 1)).item()
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / math.sqrt(sigma**2 + 0.25)
    assert c_skip * x + c_out * F == pytest.approx(x_start, abs=1e-9 * (1 + sigma))


def test_edm_is_minus_v_where_variance_and_data_are_one(monkeypatch):
    monkeypatch.setattr("improved_diffusion.diffusion.parameterization.SIGMA_DATA", 1.0)
    level = ALL_PROCESSES["cosine"].at(torch.linspace(0.01, 0.99, 50, dtype=torch.float64))
    for of_edm, of_v in zip(PARAMETERIZATIONS["edm"](level), PARAMETERIZATIONS["v"](level), strict=True):
        torch.testing.assert_close(of_edm, -of_v)


@every_process
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@given(t=levels, error=st.floats(0.01, 1))
def test_determinant_tells_how_far_an_error_of_x_start_goes(process, name, t, error):
    level = process.at(number(t * process.last_level))
    x_t, x_start = number(0.7).view(1, 1, 1, 1), number(0.2).view(1, 1, 1, 1)

    def quantity(x_0: torch.Tensor) -> float:
        return combine(name, level, x_0, (x_t - level.signal * x_0) / level.sigma).item()

    expected = error * (determinant(name, level) / level.sigma).item()
    assert abs(quantity(x_start + error) - quantity(x_start)) == pytest.approx(expected, rel=1e-6, abs=1e-12)


# Identities between products of target, loss space and weighting. A network that errs by the same x_0 in every
# parameterization has the same loss where the products are the same.


def losses(prediction: str, objective: Objective, process, t: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x_start, noise, guess = torch.randn(3, len(t), 3, 4, 4, generator=generator, dtype=torch.float64)
    level = process.at(t)

    def network(x_t, *_):
        eps = (x_t - level.signal.view(-1, 1, 1, 1) * guess) / level.sigma.view(-1, 1, 1, 1)
        return combine(prediction, level, guess, eps)

    denoiser = NetworkDenoiser(network, prediction, "fixed_small")
    denoiser.run_network = lambda x_t, level, y: (network(x_t), None)  # in float64
    return objective(denoiser, x_start, level, None, noise).loss


def middle(process) -> torch.Tensor:
    """Levels at which no divisor is raised."""
    return process.level_of(torch.logspace(-1, 1, 9, dtype=torch.float64))


@every_process
@pytest.mark.parametrize("loss_space", PARAMETERIZATIONS)
@pytest.mark.parametrize("prediction", PARAMETERIZATIONS)
def test_the_loss_is_that_of_its_space_whatever_is_predicted(process, prediction, loss_space):
    t = middle(process)
    own = losses(loss_space, Objective(), process, t)
    torch.testing.assert_close(losses(prediction, Objective(loss_space), process, t), own, rtol=1e-9, atol=0)


@every_process
@pytest.mark.parametrize("weighting", [name for name in WEIGHTINGS if name != "uniform"])
def test_a_weighted_loss_is_the_same_whatever_is_predicted(process, weighting):
    """At every level, but where the factor of the prediction's own error would be beyond its cap."""
    t = process.level_of(torch.logspace(-2.5, 2.5, 41, dtype=torch.float64))
    level, of_x_start = process.at(t), losses("x_start", Objective(), process, t)
    for prediction in PARAMETERIZATIONS:
        own = losses(prediction, Objective(), process, t)
        expected = torch.minimum(WEIGHTINGS[weighting](level) * of_x_start, MOST_FACTOR * own)
        actual = losses(prediction, Objective(weighting=weighting), process, t)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighting", [name for name in WEIGHTINGS if name not in ("uniform", "edm")])
def test_weightings_below_the_cap_are_exact_at_both_ends(weighting):
    """Where x_0 is predicted the factor is the weight; where eps is, the weight over SNR."""
    schedule = linear_schedule(1000)
    level = schedule.at(torch.arange(1000))
    weight = WEIGHTINGS[weighting](level)
    of_x_start, of_eps = (Objective(weighting=weighting)._factor(name, level) for name in ("x_start", "eps"))
    torch.testing.assert_close(of_x_start, weight)
    torch.testing.assert_close(of_eps, weight * (schedule.sigma / schedule.signal).square())


def test_named_weightings_are_what_their_papers_say():
    level = ALL_PROCESSES["cosine"].at(middle(ALL_PROCESSES["cosine"]))
    snr = (level.signal / level.sigma).square()
    torch.testing.assert_close(WEIGHTINGS["min_snr"](level), torch.minimum(snr, number(5.0)))
    torch.testing.assert_close(WEIGHTINGS["soft_min_snr"](level), snr * 4 / (snr + 4))
    sigma = 1 / snr.sqrt()
    torch.testing.assert_close(WEIGHTINGS["edm"](level), (sigma**2 + 0.25) / (sigma * 0.5) ** 2)
    torch.testing.assert_close(WEIGHTINGS["sigmoid"](level) / snr, torch.sigmoid(-1 - snr.log()))


@given(st.floats(-6, 4))
def test_v_loss_is_x_start_loss_over_the_variance_of_the_noise(log_ratio):
    """On a variance-preserving process: |v - v'|^2 = |x_0 - x_0'|^2 / sigma^2 (Salimans & Ho 2022, section 4); of a
    prediction of x_0, at most 1 / 0.05^2 (JiT)."""
    process = ALL_PROCESSES["cosine"]
    t = process.level_of(number(log_ratio).exp().view(1))
    ratio = losses("x_start", Objective("v"), process, t) / losses("x_start", Objective(), process, t)
    assert ratio.item() == pytest.approx(process.at(t).sigma.clamp(min=LEAST_DIVISOR).item() ** -2)


def test_edm_weighting_counts_the_error_of_f():
    process = ALL_PROCESSES["ve"]
    t = torch.linspace(0, 1, 20, dtype=torch.float64)
    weighted, plain = (losses("edm", Objective(weighting=name), process, t) for name in ("edm", "uniform"))
    torch.testing.assert_close(weighted, plain)


# Grids


@every_process
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 25])
def test_every_spacing_gives_so_many_increasing_levels(process, spacing, steps):
    schedule = sampling_schedule(process, steps, spacing)
    assert len(schedule) == steps
    assert (schedule.levels.diff() > 0).all()
    assert schedule.levels[0] > 0
    assert schedule.levels[-1] <= process.last_level
    most = min(80, process.at(number(process.last_level)).noise_to_signal)
    assert schedule.sigma[-1] / schedule.signal[-1] >= 0.99 * most
    assert all(table.isfinite().all() for table in (schedule.betas, schedule.posterior_log_variance))


def test_karras_levels_are_those_of_edm():
    schedule = sampling_schedule(ALL_PROCESSES["ve"], 18, "karras")
    i = np.arange(18)
    sigmas = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(schedule.sigma.flip(0), sigmas, rtol=1e-9)


def test_uniform_levels_of_steps_are_the_respaced_ones():
    schedule = cosine_schedule(200)
    expected = respace(schedule, [0, 66, 133, 199])
    assert sampling_schedule(schedule.process, 4).original_timesteps.tolist() == expected.original_timesteps.tolist()
    with pytest.raises(ValueError, match="between 1 and 200"):
        sampling_schedule(schedule.process, 201)
    with pytest.raises(ValueError, match="at least 1"):
        sampling_schedule(ALL_PROCESSES["flow"], 0)


@every_process
@given(t=levels, s=levels)
def test_posterior_between_any_two_levels_follows_from_bayes(process, t, s):
    """q(x_s | x_t, x_0): the prior N(signal_s x_0, sigma_s^2) times the likelihood of x_t given x_s; precisions add."""
    s, t = sorted((s * process.last_level, t * process.last_level))
    if t - s < 1e-3:
        return
    schedule = NoiseSchedule(process, torch.tensor([s, t], dtype=torch.float64))
    (signal_s, signal_t), (sigma_s, sigma_t) = schedule.signal.tolist(), schedule.sigma.tolist()
    ratio = signal_t / signal_s
    forward = sigma_t**2 - (ratio * sigma_s) ** 2
    precision = 1 / sigma_s**2 + ratio**2 / forward
    step = schedule.at(1).step
    assert step.variance.item() == pytest.approx(1 / precision, rel=1e-6)
    assert step.mean_x_start.item() == pytest.approx(signal_s / sigma_s**2 / precision, rel=1e-6)
    assert step.mean_x_t.item() == pytest.approx(ratio / forward / precision, rel=1e-6)
    assert step.log_forward_variance.item() == pytest.approx(math.log(forward), abs=1e-6)
