from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from improved_diffusion.diffusion.denoiser import Prediction
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

    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Prediction:
        abar = self.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        abar_prev = torch.where(t > 0, self.schedule.alphas_cumprod[t - 1], torch.ones(()).double()).view(-1, 1, 1, 1)
        variance, variance_prev = self.marginal_variance(abar), self.marginal_variance(abar_prev)
        x_start = self.mean + abar.sqrt() * self.std**2 / variance * (x_t - abar.sqrt() * self.mean)
        covariance = (abar / abar_prev).sqrt() * variance_prev  # of x_{t-1} and x_t
        log_variance = (variance_prev - covariance**2 / variance).log().expand_as(x_t)
        return Prediction(x_start, (x_t - abar.sqrt() * x_start) / (1 - abar).sqrt(), log_variance)

    def marginal_variance(self, abar: Tensor) -> Tensor:
        """Var[x_t]."""
        return abar * self.std**2 + 1 - abar


@pytest.fixture(scope="session")
def analytic_gaussian():
    return AnalyticGaussian
