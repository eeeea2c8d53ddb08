"""Samplers: functions (denoiser, schedule, x_T, y, draw_noise, ...) -> x_0, over the one denoiser contract.

They walk the levels of `schedule`, from the noisiest to the cleanest and from there to the image. `x_T` is standard
normal noise, (N, C, H, W); `draw_noise` returns fresh noise of that shape, and is called once in each step that needs
it. `on_step`, where it is given, receives the index of the level and the prediction made there.

A step between two levels is affine in x_t, x_0 and noise. Its coefficients are taken in float64: where a step is long,
some are differences of nearly equal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from improved_diffusion.diffusion.bound import posterior_mean
from improved_diffusion.diffusion.denoiser import Denoiser, Prediction
from improved_diffusion.diffusion.process import NoiseLevel, like
from improved_diffusion.diffusion.schedule import NoiseSchedule

DrawNoise = Callable[[], Tensor]
OnStep = Callable[[int, Prediction], None]


def _ignore(step: int, prediction: Prediction) -> None:
    pass


@torch.no_grad()
def ancestral(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_T: Tensor,
    y: Tensor | None,
    draw_noise: DrawNoise,
    *,
    on_step: OnStep = _ignore,
) -> Tensor:
    """Draw x_s from p(x_s | x_t), level by level (DDPM, arXiv:2006.11239, algorithm 2).

    Args:
        denoiser: the model, which gives log-variances.
        schedule: the levels to visit.
        x_T: (N, C, H, W), where to start.
        y: (N,) classes, or None.
        draw_noise: returns noise of the shape of `x_T`.
        on_step: called after each prediction.
    """
    x = _start(schedule, x_T)
    for step in reversed(range(len(schedule))):
        level = schedule.at(step)
        prediction = denoiser(x, level, y)
        on_step(step, prediction)
        x = posterior_mean(level, prediction.x_start, x)
        if step > 0:
            x = x + torch.exp(0.5 * prediction.known_log_variance) * draw_noise()
    return x


@torch.no_grad()
def ddim(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_T: Tensor,
    y: Tensor | None,
    draw_noise: DrawNoise,
    *,
    eta: float = 0.0,
    on_step: OnStep = _ignore,
) -> Tensor:
    """DDIM (Song et al. 2020, arXiv:2010.02502, equation 12): deterministic at eta = 0, DDPM-like at eta = 1. On a
    rectified flow, eta = 0 is Euler's method.

    Arguments as for `ancestral`.

    Raises:
        ValueError: `eta` is not between 0 and 1.
    """
    _require_eta(eta)
    x = _start(schedule, x_T)
    for step in reversed(range(len(schedule))):
        level, (signal, sigma) = schedule.at(step), _next(schedule, step)
        prediction = denoiser(x, level, y)
        on_step(step, prediction)
        fresh = eta * level.reverse_step.variance.sqrt()
        direction = (sigma.square() - fresh.square()).clamp(min=0).sqrt()
        x = like(signal, x) * prediction.x_start + like(direction, x) * prediction.eps
        if eta > 0 and step > 0:
            x = x + like(fresh, x) * draw_noise()
    return x


@torch.no_grad()
def heun(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_T: Tensor,
    y: Tensor | None,
    draw_noise: DrawNoise,
    *,
    churn: float = 0.0,
    churn_min: float = 0.05,
    churn_max: float = 50.0,
    churn_noise: float = 1.003,
    on_step: OnStep = _ignore,
) -> Tensor:
    """Heun's second-order method with churn (Karras et al. 2022, arXiv:2206.00364, algorithm 2), in two evaluations a
    step but for the last.

    It integrates z = x / signal over r = sigma / signal, where every process is the variance-exploding one. Its levels
    must have a signal, and r of about 80 at the most: those of the spacings `karras` and `log_snr`.

    Arguments as for `ancestral`, and S_churn, S_min, S_max and S_noise of the paper.
    """
    x = _start(schedule, x_T)
    gain = min(churn / len(schedule), math.sqrt(2) - 1)
    for step in reversed(range(len(schedule))):
        level, (signal, sigma) = schedule.at(step), _next(schedule, step)
        if gain > 0 and churn_min <= float(level.noise_to_signal) <= churn_max:
            x, level = _add_noise(schedule, level, x, gain, churn_noise * draw_noise())
        prediction = denoiser(x, level, y)
        on_step(step, prediction)
        x = like(signal, x) * prediction.x_start + like(sigma, x) * prediction.eps  # Euler's step
        if step > 0:
            correction = (denoiser(x, schedule.at(step - 1), y).eps - prediction.eps) / 2
            x = x + like(signal * (sigma / signal - level.noise_to_signal), x) * correction
    return x


def _add_noise(
    schedule: NoiseSchedule, level: NoiseLevel, x: Tensor, gain: float, noise: Tensor
) -> tuple[Tensor, NoiseLevel]:
    """x at a level where sigma / signal is (1 + gain) times as high."""
    higher = schedule.process.at(schedule.process.level_of((1 + gain) * level.noise_to_signal))
    added = (higher.noise_to_signal.square() - level.noise_to_signal.square()).clamp(min=0).sqrt()
    return like(higher.signal / level.signal, x) * x + like(higher.signal * added, x) * noise, higher


@torch.no_grad()
def dpmpp_2m(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_T: Tensor,
    y: Tensor | None,
    draw_noise: DrawNoise,
    *,
    eta: float = 0.0,
    on_step: OnStep = _ignore,
) -> Tensor:
    """DPM-Solver++(2M) at eta = 0, its SDE form at eta = 1 (Lu et al. 2022, arXiv:2211.01095, algorithm 2 and section
    6): second order, one evaluation a step. x_0 is extrapolated from the last two predictions along
    lambda = ln(signal / sigma).

    Arguments as for `ancestral`.

    Raises:
        ValueError: `eta` is not between 0 and 1.
    """
    _require_eta(eta)
    x = _start(schedule, x_T)
    last: tuple[Tensor, Tensor] | None = None  # x_0 and h of the step before
    for step in reversed(range(len(schedule))):
        level, (signal, sigma) = schedule.at(step), _next(schedule, step)
        prediction = denoiser(x, level, y)
        on_step(step, prediction)
        shrink = sigma / signal / level.noise_to_signal  # exp(-h), where lambda rises by h; 0 in the step to the image
        x_start, h = prediction.x_start, -torch.log(shrink)
        if last is not None and step > 0:
            last_x_start, last_h = last
            x_start = x_start + like(h / (2 * last_h), x) * (x_start - last_x_start)
        x = like(sigma / level.sigma * shrink**eta, x) * x + like(signal * (1 - shrink ** (1 + eta)), x) * x_start
        if eta > 0 and step > 0:
            x = x + like(sigma * torch.sqrt(1 - shrink ** (2 * eta)), x) * draw_noise()
        last = prediction.x_start, h
    return x


def _start(schedule: NoiseSchedule, x_T: Tensor) -> Tensor:
    return like(schedule.at(-1).initial_std, x_T) * x_T


def _next(schedule: NoiseSchedule, step: int) -> tuple[Tensor, Tensor]:
    """signal and sigma where the step of index `step` leads: to the level below, or to the image."""
    if step == 0:
        return torch.ones_like(schedule.signal[0]), torch.zeros_like(schedule.sigma[0])
    return schedule.signal[step - 1], schedule.sigma[step - 1]


def _require_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, not {eta}")


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ancestral": ancestral, "ddim": ddim, "heun": heun, "dpmpp_2m": dpmpp_2m}
