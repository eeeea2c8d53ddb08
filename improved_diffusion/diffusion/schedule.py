"""Noise schedules, and every table that follows from the betas.

Notation of Ho et al. 2020 (DDPM, arXiv:2006.11239) and Nichol & Dhariwal 2021 (improved DDPM, arXiv:2102.09672).
Timesteps are 0..T-1; t = T-1 is almost pure noise. Tables are float64, shape (T,).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_BETA = 0.999  # keeps the last step of the cosine schedule from being singular (improved DDPM, section 3.2)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A forward process, given by its alphas_cumprod, from which everything else follows.

    Not by its betas: where alphas_cumprod is as small as 1e-17, 1 - beta has no digits left to give it back.

    `original_timesteps` are the timesteps that a network is told about: 0..T-1, or the subset of them that a
    respaced schedule kept; `original_length` is the T that they count up to.
    """

    alphas_cumprod: Tensor
    original_timesteps: Tensor
    original_length: int

    betas: Tensor = dataclasses.field(init=False)
    alphas_cumprod_prev: Tensor = dataclasses.field(init=False)
    posterior_mean_coef1: Tensor = dataclasses.field(init=False)
    posterior_mean_coef2: Tensor = dataclasses.field(init=False)
    posterior_variance: Tensor = dataclasses.field(init=False)
    posterior_log_variance: Tensor = dataclasses.field(init=False)
    fixed_large_variance: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        alphas_cumprod = self.alphas_cumprod
        if alphas_cumprod.ndim != 1 or not 0 < len(alphas_cumprod) == len(self.original_timesteps):
            raise ValueError("alphas_cumprod must be a vector with a value for each original timestep, at least one")
        previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        if not bool(((alphas_cumprod >= 0) & (alphas_cumprod < previous)).all()):
            raise ValueError("alphas_cumprod must fall from below 1, and not below 0")
        betas = 1 - alphas_cumprod / previous
        # q(x_{t-1} | x_t, x_0) = N(coef1 x_0 + coef2 x_t, variance): DDPM, equations 6 and 7.
        posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
        # The variance at t = 0 is 0; its logarithm takes the value at t = 1 (or beta, where there is no t = 1).
        after_first = torch.cat([posterior_variance[1:2] if len(betas) > 1 else betas, posterior_variance[1:]])
        tables = {
            "betas": betas,
            "alphas_cumprod_prev": previous,
            "posterior_mean_coef1": betas * previous.sqrt() / (1 - alphas_cumprod),
            "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod),
            "posterior_variance": posterior_variance,
            "posterior_log_variance": after_first.log(),
            "fixed_large_variance": torch.cat([after_first[:1], betas[1:]]),
        }
        for name, table in tables.items():
            object.__setattr__(self, name, table)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule with its tables on `device`."""
        return NoiseSchedule(self.alphas_cumprod.to(device), self.original_timesteps.to(device), self.original_length)


def _schedule(betas: Tensor) -> NoiseSchedule:
    return NoiseSchedule(torch.cumprod(1 - betas, dim=0), torch.arange(len(betas)), len(betas))


def cosine_schedule(timesteps: int, s: float = 0.008) -> NoiseSchedule:
    """The cosine schedule: alphas_cumprod(t) = cos^2((t/T + s) / (1 + s) * pi/2) (improved DDPM, equation 17).

    Raises:
        ValueError: `timesteps` is not positive.
    """
    _require_positive(timesteps)
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    alphas_cumprod = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return _schedule((1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=MAX_BETA))


def linear_schedule(timesteps: int) -> NoiseSchedule:
    """The linear schedule of DDPM, 1e-4 to 0.02 at T = 1000, scaled by 1000 / T so that any T > 1 ends in noise.

    The scaled betas pass 1 where T < 20, so they are capped at 0.999 as the cosine schedule's are.

    Raises:
        ValueError: `timesteps` is not positive.
    """
    _require_positive(timesteps)
    scale = 1000 / timesteps
    return _schedule(torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64).clamp(max=MAX_BETA))


SCHEDULES = {"cosine": cosine_schedule, "linear": linear_schedule}


def respace(schedule: NoiseSchedule, timesteps: Sequence[int] | Tensor) -> NoiseSchedule:
    """The process that visits only `timesteps`: beta'_k = 1 - abar_k / abar_(k-1) (improved DDPM, equation 19).

    Args:
        schedule: the process to thin out.
        timesteps: increasing indices into it, at least one; the network still receives the original timesteps.

    Raises:
        ValueError: `timesteps` is empty, not increasing, or out of range.
    """
    kept = torch.as_tensor(timesteps, device=schedule.alphas_cumprod.device)
    increasing = kept.ndim == 1 and len(kept) > 0 and not kept.is_floating_point() and bool((kept.diff() > 0).all())
    if not increasing or kept[0] < 0 or kept[-1] >= len(schedule):
        raise ValueError(f"respacing needs increasing timesteps, integers from 0 to {len(schedule) - 1}")
    return NoiseSchedule(schedule.alphas_cumprod[kept], schedule.original_timesteps[kept], schedule.original_length)


def evenly_spaced(length: int, steps: int) -> list[int]:
    """`steps` indices spread evenly over 0..length-1, both ends included; one step is the last index.

    Raises:
        ValueError: `steps` is not between 1 and `length`.
    """
    if not 1 <= steps <= length:
        raise ValueError(f"the number of sampling steps must be between 1 and {length}, not {steps}")
    if steps == 1:
        return [length - 1]
    return [round(i * (length - 1) / (steps - 1)) for i in range(steps)]


def _require_positive(timesteps: int) -> None:
    if timesteps < 1:
        raise ValueError(f"a schedule needs at least 1 timestep, not {timesteps}")
