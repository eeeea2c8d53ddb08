"""The forward process q, its posterior, and the ways to say where x_t came from: x_0, eps or v.

Images are (N, C, H, W); `t` is int64 (N,), an index into the schedule. Tables are float64 and cast to the images' dtype
after the look-up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from improved_diffusion.diffusion.schedule import NoiseSchedule


def at(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """`table[t]`, shaped (N, 1, ..., 1) to multiply `x`, in the dtype of `x`."""
    return table[t].to(x.dtype).view(-1, *(1,) * (x.ndim - 1))


def q_sample(schedule: NoiseSchedule, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (DDPM, equation 4)."""
    signal, sigma = _signal_and_noise(schedule, t, x_start)
    return signal * x_start + sigma * noise


def q_posterior_mean(schedule: NoiseSchedule, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The mean of q(x_{t-1} | x_t, x_0) (DDPM, equation 7)."""
    return at(schedule.posterior_mean_coef1, t, x_t) * x_start + at(schedule.posterior_mean_coef2, t, x_t) * x_t


def x_start_from_eps(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The x_0 that noise `eps` turned into x_t."""
    signal, sigma = _signal_and_noise(schedule, t, x_t)
    return (x_t - sigma * eps) / signal


def eps_from_x_start(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
    """The noise that turned `x_start` into x_t."""
    signal, sigma = _signal_and_noise(schedule, t, x_t)
    return (x_t - signal * x_start) / sigma


def v_from_x_start_and_eps(schedule: NoiseSchedule, x_start: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022, arXiv:2202.00512, section 4)."""
    signal, sigma = _signal_and_noise(schedule, t, x_start)
    return signal * eps - sigma * x_start


def x_start_from_v(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """x_0 = sqrt(abar_t) x_t - sqrt(1 - abar_t) v."""
    signal, sigma = _signal_and_noise(schedule, t, x_t)
    return signal * x_t - sigma * v


def eps_from_v(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """eps = sqrt(1 - abar_t) x_t + sqrt(abar_t) v."""
    signal, sigma = _signal_and_noise(schedule, t, x_t)
    return sigma * x_t + signal * v


def learned_range_log_variance(schedule: NoiseSchedule, t: Tensor, v: Tensor) -> Tensor:
    """A log-variance between those of beta~_t, at v = -1, and beta_t, at v = 1 (improved DDPM, equation 15).

    v is not clamped: it may pass these bounds.
    """
    lower = at(schedule.posterior_log_variance, t, v)
    upper = at(schedule.betas.log(), t, v)
    fraction = (v + 1) / 2
    return fraction * upper + (1 - fraction) * lower


def fixed_log_variance(schedule: NoiseSchedule, variance: str, t: Tensor, x: Tensor) -> Tensor:
    """log-variance of `fixed_small` (beta~_t) or `fixed_large` (beta_t, but beta~_1 at t = 0), shape of `x`."""
    table = {
        "fixed_small": schedule.posterior_log_variance,
        "fixed_large": schedule.fixed_large_variance.log(),
    }[variance]
    return at(table, t, x).expand_as(x)


def _signal_and_noise(schedule: NoiseSchedule, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t), taken in float64."""
    alphas_cumprod = schedule.alphas_cumprod
    return at(torch.sqrt(alphas_cumprod), t, x), at(torch.sqrt(1 - alphas_cumprod), t, x)
