from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from improved_diffusion.diffusion.bound import posterior_mean
from improved_diffusion.diffusion.denoiser import NetworkDenoiser
from improved_diffusion.diffusion.parameterization import combine, q_sample, resolve
from improved_diffusion.diffusion.schedule import SCHEDULES, cosine_schedule, respace

pixels = st.floats(-1, 1)
noises = st.floats(-5, 5)


def image(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


def learned_range(schedule, t: int, v: float) -> torch.Tensor:
    denoiser = NetworkDenoiser(None, "v", "learned_range")
    return denoiser.interpret(image(0.0), schedule.at(t), image(0.0), image(v)).log_variance


@st.composite
def schedules_and_times(draw):
    timesteps = draw(st.integers(1, 1000))
    schedule = SCHEDULES[draw(st.sampled_from(["cosine", "linear"]))](timesteps)
    return schedule, torch.tensor([draw(st.integers(0, timesteps - 1))])


def test_q_sample_is_distributed_as_the_markov_chain():
    """x_t drawn at once and x_t reached through q(x_t | x_{t-1}) step by step agree in mean and variance."""
    generator = torch.Generator().manual_seed(0)
    schedule, n, x_start = cosine_schedule(20), 100_000, 0.7
    x = torch.full((n,), x_start, dtype=torch.float64)
    for t, beta in enumerate(schedule.betas.tolist()):
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * torch.randn(n, generator=generator, dtype=torch.float64)
        noise = torch.randn(n, 1, 1, 1, generator=generator, dtype=torch.float64)
        at_once = q_sample(schedule.at(torch.full((n,), t)), torch.full_like(noise, x_start), noise)
        std_error = x.std().item() / math.sqrt(n)
        assert at_once.mean().item() == pytest.approx(x.mean().item(), abs=6 * std_error)
        assert at_once.std().item() == pytest.approx(x.std().item(), rel=0.02)


def test_q_posterior_mean_is_what_the_chain_regresses_to():
    """Among simulated chains from one x_0, the regression of x_{t-1} on x_t is the posterior mean."""
    generator = torch.Generator().manual_seed(0)
    schedule, n, x_start, t = cosine_schedule(10), 200_000, -0.4, 6
    chain = [torch.full((n,), x_start, dtype=torch.float64)]
    for beta in schedule.betas[: t + 1].tolist():
        noise = torch.randn(n, generator=generator, dtype=torch.float64)
        chain.append(math.sqrt(1 - beta) * chain[-1] + math.sqrt(beta) * noise)
    slope, intercept = np.polyfit(chain[t + 1], chain[t], 1)
    residual = chain[t] - slope * chain[t + 1] - intercept

    mean = [posterior_mean(schedule.at(t), image(x_start), image(x)).item() for x in (0.0, 1.0)]
    assert mean[0] == pytest.approx(intercept, abs=0.01)
    assert mean[1] - mean[0] == pytest.approx(slope, abs=0.01)
    assert schedule.posterior_variance[t].item() == pytest.approx(residual.var().item(), rel=0.02)


@given(schedules_and_times(), pixels, noises)
def test_eps_x_start_and_v_say_the_same(case, x_start, noise):
    schedule, t = case
    x_start, noise = image(x_start), image(noise)
    level = schedule.at(t)
    x_t = q_sample(level, x_start, noise)
    v = combine("v", level, x_start, noise)
    # Dividing by sqrt(abar), or by sqrt(1 - abar), is as ill-conditioned as it is small.
    signal, sigma = schedule.alphas_cumprod[t].sqrt().item(), (1 - schedule.alphas_cumprod[t]).sqrt().item()
    exact = {"rtol": 0, "atol": 1e-13}
    of_eps, of_x_start, of_v = (
        resolve(name, level, x_t, known) for name, known in (("eps", noise), ("x_start", x_start), ("v", v))
    )
    torch.testing.assert_close(of_eps[0], x_start, rtol=0, atol=1e-14 * (1 + 1 / signal))
    torch.testing.assert_close(of_x_start[1], noise, rtol=0, atol=1e-14 * (1 + 1 / sigma))
    torch.testing.assert_close(of_v[0], x_start, **exact)
    torch.testing.assert_close(of_v[1], noise, **exact)


@given(schedules_and_times(), pixels, noises)
def test_v_is_the_velocity_of_x_t(case, x_start, noise):
    """v is d x_t / d phi, where abar_t = cos^2 phi (Salimans & Ho 2022, appendix D)."""
    schedule, t = case
    phi = torch.acos(schedule.alphas_cumprod[t].sqrt()).requires_grad_()
    x_t = torch.cos(phi) * x_start + torch.sin(phi) * noise
    (velocity,) = torch.autograd.grad(x_t, phi)
    v = combine("v", schedule.at(t), image(x_start), image(noise))
    assert v.item() == pytest.approx(velocity.item(), abs=1e-7)


@given(st.integers(0, 199), st.floats(-3, 3))
def test_learned_range_interpolates_log_variances_without_clamping(t, v):
    schedule = cosine_schedule(200)
    beta = math.log(schedule.betas[t].item())
    # beta~ by Bayes; where it is 0, at t = 0, its value at t = 1 stands in
    after = max(t, 1)
    prior, step = 1 - schedule.alphas_cumprod[after - 1].item(), schedule.betas[after].item()
    beta_tilde = -math.log(1 / prior + (1 - step) / step)
    log_variance = learned_range(schedule, t, v)
    slope, middle = (beta - beta_tilde) / 2, (beta + beta_tilde) / 2
    assert log_variance.item() == pytest.approx(middle + slope * v, abs=1e-9)


def test_learned_range_of_a_respaced_process_is_between_its_own_variances():
    schedule = cosine_schedule(1000)
    respaced = respace(schedule, [0, 500, 999])
    bounds = [learned_range(respaced, 1, v).exp().item() for v in (-1, 1)]
    step = 1 - (schedule.alphas_cumprod[500] / schedule.alphas_cumprod[0]).item()
    prior = schedule.betas[0].item()
    assert bounds == pytest.approx([1 / (1 / prior + (1 - step) / step), step], rel=1e-9)


@pytest.mark.parametrize("timesteps", [1, 2, 50])
def test_fixed_variances(timesteps):
    schedule = cosine_schedule(timesteps)
    t = torch.arange(timesteps)
    x = torch.zeros(timesteps, 3, 2, 2, dtype=torch.float64)
    small, large = (
        NetworkDenoiser(lambda *_: x, "v", variance)(x, schedule.at(t), None).log_variance
        for variance in ("fixed_small", "fixed_large")
    )
    assert small.shape == large.shape == x.shape
    torch.testing.assert_close(small[:, 2, 1, 0], schedule.posterior_log_variance)
    torch.testing.assert_close(large[1:, 0, 0, 0], schedule.betas[1:].log())
    torch.testing.assert_close(large[0], small[0])


def test_tables_are_rounded_once():
    """float32 images meet coefficients that are float64's, rounded: not float32 square roots of float32 sums."""
    schedule = cosine_schedule(4000)
    t = torch.arange(4000)
    one, zero = torch.ones(4000, 1, 1, 1), torch.zeros(4000, 1, 1, 1)
    signal, sigma = q_sample(schedule.at(t), one, zero), q_sample(schedule.at(t), zero, one)
    assert signal.dtype == torch.float32
    assert torch.equal(signal.flatten(), schedule.alphas_cumprod.sqrt().float())
    assert torch.equal(sigma.flatten(), (1 - schedule.alphas_cumprod).sqrt().float())


def test_each_image_has_its_own_timestep():
    schedule = cosine_schedule(100)
    generator = torch.Generator().manual_seed(0)
    x_start, noise = torch.randn(2, 4, 3, 5, 5, generator=generator)
    t = torch.tensor([3, 99, 0, 50])
    together = q_sample(schedule.at(t), x_start, noise)
    for i in range(4):
        alone = q_sample(schedule.at(t[i : i + 1]), x_start[i : i + 1], noise[i : i + 1])
        assert torch.equal(together[i], alone[0])
