"""What a network can predict of x_t = signal x_0 + sigma eps, and how x_0 and eps follow from it.

Each parameterization is a combination a x_0 + b eps, whose coefficients depend on the noise level alone:

    eps        eps                          (DDPM, arXiv:2006.11239, equation 14)
    x_start    x_0
    v          signal eps - sigma x_0       (Salimans & Ho 2022, arXiv:2202.00512, section 4)
    velocity   eps - x_0                    (rectified flow: d x_t / d t; Liu et al. 2022, arXiv:2209.03003)
    edm        F, which completes what x_t alone tells of x_0 to unit variance (Karras et al. 2022, arXiv:2206.00364,
               equation 7); on a variance-preserving process with data of unit variance it is -v

Images are (N, C, H, W). Coefficients are float64 and are rounded to the images' type where they meet them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from improved_diffusion.diffusion.process import SIGMA_DATA, NoiseLevel, like

Coefficients = Callable[[NoiseLevel], tuple[Tensor, Tensor]]


def _eps(level: NoiseLevel) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(level.t), torch.ones_like(level.t)


def _x_start(level: NoiseLevel) -> tuple[Tensor, Tensor]:
    return torch.ones_like(level.t), torch.zeros_like(level.t)


def _v(level: NoiseLevel) -> tuple[Tensor, Tensor]:
    return -level.sigma, level.signal


def _velocity(level: NoiseLevel) -> tuple[Tensor, Tensor]:
    return -torch.ones_like(level.t), torch.ones_like(level.t)


def _edm(level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """F = (x_0 - c_skip x_t) / c_out, with EDM's c_skip and c_out for a signal that need not be 1."""
    variance = (level.signal * SIGMA_DATA).square() + level.sigma.square()  # of x_t
    c_skip = level.signal * SIGMA_DATA**2 / variance
    c_out = level.sigma * SIGMA_DATA / variance.sqrt()
    # (1 - c_skip signal) / c_out, without the difference:
    return level.sigma / (SIGMA_DATA * variance.sqrt()), -c_skip * level.sigma / c_out


PARAMETERIZATIONS: dict[str, Coefficients] = {
    "eps": _eps,
    "x_start": _x_start,
    "v": _v,
    "velocity": _velocity,
    "edm": _edm,
}


def q_sample(level: NoiseLevel, x_start: Tensor, noise: Tensor) -> Tensor:
    """x_t = signal x_0 + sigma eps (DDPM, equation 4)."""
    return like(level.signal, x_start) * x_start + like(level.sigma, x_start) * noise


def combine(name: str, level: NoiseLevel, x_start: Tensor, eps: Tensor) -> Tensor:
    """The quantity called `name` where x_t is made of `x_start` and `eps`."""
    if name in ("eps", "x_start"):
        return eps if name == "eps" else x_start
    a, b = PARAMETERIZATIONS[name](level)
    return like(a, x_start) * x_start + like(b, x_start) * eps


def resolve(name: str, level: NoiseLevel, x_t: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """x_0 and eps, given x_t and the quantity called `name`: the solution of two linear equations.

    x_0 is not finite for `eps` where there is no signal, nor is eps for `x_start` where there is no noise.
    """
    if name == "eps":
        return (x_t - like(level.sigma, x_t) * predicted) / like(level.signal, x_t), predicted
    if name == "x_start":
        return predicted, eps_from_x_start(level, x_t, predicted)
    a, b = PARAMETERIZATIONS[name](level)
    determinant = level.signal * b - level.sigma * a
    x_start = like(b / determinant, x_t) * x_t - like(level.sigma / determinant, x_t) * predicted
    eps = like(level.signal / determinant, x_t) * predicted - like(a / determinant, x_t) * x_t
    return x_start, eps


def eps_from_x_start(level: NoiseLevel, x_t: Tensor, x_start: Tensor) -> Tensor:
    """The noise that turned `x_start` into x_t."""
    return (x_t - like(level.signal, x_t) * x_start) / like(level.sigma, x_t)


def determinant(name: str, level: NoiseLevel) -> Tensor:
    """|signal b - sigma a|, float64, of the level's shape: 1 for v and velocity, signal for eps, sigma for x_start.

    Given x_t, an error e in x_0 is one of e * determinant / sigma in the quantity called `name`. So a mean-square error
    in one parameterization is a weighted one in any other.
    """
    a, b = PARAMETERIZATIONS[name](level)
    return (level.signal * b - level.sigma * a).abs()
