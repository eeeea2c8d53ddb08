from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from improved_diffusion.diffusion.denoiser import Prediction
from improved_diffusion.diffusion.process import NoiseLevel, like
from improved_diffusion.diffusion.schedule import NoiseSchedule

settings.register_profile("diffusion", deadline=None, max_examples=40)
settings.load_profile("diffusion")


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class AnalyticGaussian:
    """The perfect denoiser of pixels x_0 ~ N(mean, std^2): x_{t-1}, x_t and x_0 are jointly Gaussian, so that every
    conditional follows from their covariances."""

    def __init__(self, schedule: NoiseSchedule, mean: float, std: float):
        self.schedule, self.mean, self.std = schedule, mean, std

    def __call__(self, x_t: Tensor, level: NoiseLevel, y: Tensor | None) -> Prediction:
        signal, sigma = like(level.signal, x_t), like(level.sigma, x_t)
        variance = self.marginal_variance(signal, sigma)
        x_start = self.mean + signal * self.std**2 / variance * (x_t - signal * self.mean)
        eps = sigma / variance * (x_t - signal * self.mean)
        log_variance = None if level.step is None else self.log_variance(level).expand_as(x_t)
        return Prediction(x_start, eps, log_variance)

    def log_variance(self, level: NoiseLevel) -> Tensor:
        """ln Var[x_s | x_t], where s is the level below t in the schedule."""
        index = torch.searchsorted(self.schedule.levels, level.t)
        below = (index - 1).clamp(min=0)
        signal_s = torch.where(index > 0, self.schedule.signal[below], 1.0)
        sigma_s = torch.where(index > 0, self.schedule.sigma[below], 0.0)
        variance_s = self.marginal_variance(signal_s, sigma_s)
        covariance = level.signal / signal_s * variance_s  # of x_s and x_t
        return (variance_s - covariance**2 / self.marginal_variance(level.signal, level.sigma)).log().view(-1, 1, 1, 1)

    def marginal_variance(self, signal: Tensor, sigma: Tensor) -> Tensor:
        """Var[x_t]."""
        return (signal * self.std) ** 2 + sigma**2


@pytest.fixture(scope="session")
def analytic_gaussian():
    return AnalyticGaussian
