"""With perfect denoisers every sampler arrives, at its order, on every process."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import kstest, norm
from torch import Tensor

from improved_diffusion.diffusion.bound import variational_bound
from improved_diffusion.diffusion.denoiser import Prediction
from improved_diffusion.diffusion.process import PROCESSES, NoiseLevel
from improved_diffusion.diffusion.samplers import ancestral, ddim, dpmpp_2m, heun
from improved_diffusion.diffusion.schedule import NoiseSchedule, cosine_schedule, linear_schedule, sampling_schedule

MEAN, STD = 0.3, 1.0
ALL_PROCESSES = {
    **{name: make() for name, make in PROCESSES.items()},
    "cosine steps": cosine_schedule(1000).process,
    "linear steps": linear_schedule(1000).process,
}
every_process = pytest.mark.parametrize("process", ALL_PROCESSES.values(), ids=ALL_PROCESSES.keys())


class MixtureDenoiser:
    """The perfect one of pixels that are half N(-0.6, 0.2^2) and half N(0.5, 0.3^2)."""

    means, stds = torch.tensor([-0.6, 0.5], dtype=torch.float64), torch.tensor([0.2, 0.3], dtype=torch.float64)

    def __init__(self, schedule: NoiseSchedule):
        self.schedule = schedule

    def __call__(self, x_t: Tensor, level: NoiseLevel, y: Tensor | None) -> Prediction:
        signal, sigma = level.signal, level.sigma
        variances = (signal * self.stds).square() + sigma.square()
        centred = x_t[..., None] - signal * self.means
        shares = torch.softmax(-centred.square() / (2 * variances) - variances.log() / 2, dim=-1)
        x_start = (shares * (self.means + signal * self.stds.square() / variances * centred)).sum(-1)
        # What is left is the variance of x_0 given x_t, which the step's own variance does not count.
        log_variance = None if level.step is None else level.step.log_variance.expand_as(x_t)
        return Prediction(x_start, (x_t - signal * x_start) / sigma, log_variance)

    def cdf(self, x: np.ndarray) -> np.ndarray:
        return norm.cdf(np.subtract.outer(x, self.means.numpy()) / self.stds.numpy()).mean(-1)


def no_noise() -> Tensor:
    raise AssertionError("not to be drawn")


def flow_error(sampler, process, steps: int, analytic_gaussian) -> float:
    """How far a sample ends from the solution of the probability-flow equation, along which a deviation from the mean
    grows and shrinks as the standard deviation of x_t does."""
    schedule = sampling_schedule(process, steps, "karras")
    x_T = torch.tensor([-1.5, 0.2, 1.1], dtype=torch.float64).view(-1, 1, 1, 1)
    sample = sampler(analytic_gaussian(schedule, MEAN, STD), schedule, x_T, None, no_noise)
    last = schedule.at(-1)
    deviation = last.initial_std * x_T - last.signal * MEAN
    exact = MEAN + STD * deviation / ((last.signal * STD).square() + last.sigma.square()).sqrt()
    return float((sample - exact).abs().max())


@every_process
@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (heun, 2), (dpmpp_2m, 2)], ids=["ddim", "heun", "dpmpp_2m"])
def test_error_falls_with_the_order_of_the_method(process, sampler, order, analytic_gaussian):
    errors = [flow_error(sampler, process, steps, analytic_gaussian) for steps in (20, 40, 80)]
    slopes = np.log2(np.divide(errors[:-1], errors[1:]))
    assert slopes.min() > order - 0.25
    assert errors[-1] < (0.05 if order == 1 else 0.004)


@every_process
@pytest.mark.parametrize("spacing", ["karras", "log_snr"])
def test_all_deterministic_samplers_agree_in_the_limit(process, spacing):
    schedule = sampling_schedule(process, 400, spacing)
    x_T = torch.linspace(-2.5, 2.5, 21, dtype=torch.float64).view(-1, 1, 1, 1)
    samples = [sampler(MixtureDenoiser(schedule), schedule, x_T, None, no_noise) for sampler in (ddim, heun, dpmpp_2m)]
    torch.testing.assert_close(samples[1], samples[2], rtol=0, atol=2e-3)
    torch.testing.assert_close(samples[0], samples[1], rtol=0, atol=0.03)
    # and carry every quantile of the noise to the same one of the data
    quantiles = norm.cdf(x_T.flatten().numpy())
    np.testing.assert_allclose(MixtureDenoiser(schedule).cdf(samples[1].flatten().numpy()), quantiles, atol=0.01)


STOCHASTIC = {
    "ancestral": ancestral,
    "ddim, eta 1": partial(ddim, eta=1.0),
    "heun with churn": partial(heun, churn=40.0, churn_noise=1.0),
    "dpmpp_2m, eta 1": partial(dpmpp_2m, eta=1.0),
}


@every_process
@pytest.mark.parametrize("sampler", STOCHASTIC.values(), ids=STOCHASTIC.keys())
def test_stochastic_samplers_draw_from_the_data(process, sampler):
    schedule = sampling_schedule(process, 200, "log_snr")
    generator = torch.Generator().manual_seed(0)

    def draw_noise() -> Tensor:
        return torch.randn(1500, 1, 1, 1, generator=generator, dtype=torch.float64)

    denoiser = MixtureDenoiser(schedule)
    samples = sampler(denoiser, schedule, draw_noise(), None, draw_noise)
    assert kstest(samples.flatten(), denoiser.cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_bound_of_many_steps_is_the_integral_over_levels(name, analytic_gaussian):
    """Without its first and last terms it tends to 1/2 of the integral of |x_0 - its prediction|^2 over the signal-to-
    noise ratio (Kingma et al. 2021, arXiv:2107.00630, equation 18), here of a model that is off by a tenth."""
    process, std = ALL_PROCESSES[name], 0.25
    low, high = (process.level_of(torch.tensor(ratio, dtype=torch.float64)).item() for ratio in (0.05, 20.0))

    def error(snr: float) -> float:
        return 1 / (1 / std**2 + snr) + (0.1 * MEAN) ** 2 + 0.01 * std**4 * snr / (1 + std**2 * snr)

    exact = quad(error, 20.0**-2, 0.05**-2, limit=200)[0] / 2 / math.log(2)
    points, weights = np.polynomial.hermite_e.hermegauss(3)
    x, eps = np.meshgrid(points, points, indexing="ij")
    x_start, noise = (torch.tensor(v).reshape(-1, 1, 1, 1) for v in (MEAN + std * x, eps))
    weights = torch.tensor(np.outer(weights, weights).ravel() / weights.sum() ** 2)

    differences = []
    for steps in (50, 100, 200):
        schedule = NoiseSchedule(process, torch.linspace(low, high, steps + 1, dtype=torch.float64))
        perfect = analytic_gaussian(schedule, MEAN, std)

        def off(x_t, level, y, perfect=perfect):
            x_0 = 1.1 * perfect(x_t, level, y).x_start
            return Prediction(x_0, (x_t - level.signal * x_0) / level.sigma, level.step.log_variance.expand_as(x_t))

        bound = variational_bound(off, schedule, x_start, None, lambda: noise)
        differences.append(float(weights @ bound.vlb[:, 1:].sum(1)) - exact)
    assert differences[-1] > 0  # fewer steps cost bits
    assert differences[-1] < 0.1 * exact
    assert differences[0] > 1.6 * differences[1] > 1.6**2 * differences[2]
