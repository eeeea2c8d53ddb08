"""Grids of noise levels, with every table that belongs to the steps between them.

Notation of Ho et al. 2020 (DDPM, arXiv:2006.11239) and Nichol & Dhariwal 2021 (improved DDPM, arXiv:2102.09672). A
process of T steps is a grid, index t = 0..T-1; t = T-1 is almost pure noise. Respacing it gives another grid. Tables
are float64, shape (T,).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from improved_diffusion.diffusion.process import NoiseLevel, Process, ReverseStep, TabulatedProcess

MAX_BETA = 0.999  # keeps the last step of the cosine schedule from being singular (improved DDPM, section 3.2)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Some levels of a process, increasing, and the reverse steps between neighbours; the first leads to the image.

    `original_timesteps` are the timesteps that a network is told about: 0..T-1, or the subset of them that a
    respaced schedule kept; `original_length` is the T that they count up to. On a process in continuous time they are
    t on the scale 0..1.
    """

    process: Process
    levels: Tensor

    signal: Tensor = dataclasses.field(init=False)
    sigma: Tensor = dataclasses.field(init=False)
    original_timesteps: Tensor = dataclasses.field(init=False)
    betas: Tensor = dataclasses.field(init=False)
    posterior_mean_coef1: Tensor = dataclasses.field(init=False)
    posterior_mean_coef2: Tensor = dataclasses.field(init=False)
    posterior_variance: Tensor = dataclasses.field(init=False)
    posterior_log_variance: Tensor = dataclasses.field(init=False)
    fixed_large_variance: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        if self.levels.ndim != 1 or len(self.levels) == 0:
            raise ValueError("a schedule needs a vector of levels, at least one")
        at = self.process.at(self.levels)
        signal, sigma = at.signal, at.sigma
        previous_signal = torch.cat([signal.new_ones(1), signal[:-1]])
        previous_sigma = torch.cat([sigma.new_zeros(1), sigma[:-1]])
        if not bool((sigma * previous_signal > previous_sigma * signal).all()):
            raise ValueError("the levels of a schedule must increase, and its noise with them")
        # q(x_t | x_s) = N(ratio x_s, betas); in a variance-preserving process betas = 1 - abar_t / abar_s.
        ratio = signal / previous_signal
        betas = sigma.square() - (ratio * previous_sigma).square()
        # q(x_s | x_t, x_0) = N(coef1 x_0 + coef2 x_t, variance): DDPM, equations 6 and 7.
        posterior_variance = betas * (previous_sigma / sigma).square()
        # The variance at t = 0 is 0; its logarithm takes the value at t = 1 (or beta, where there is no t = 1).
        after_first = torch.cat([posterior_variance[1:2] if len(betas) > 1 else betas, posterior_variance[1:]])
        tables = {
            "signal": signal,
            "sigma": sigma,
            "original_timesteps": self._original(at.timestep),
            "betas": betas,
            "posterior_mean_coef1": previous_signal * betas / sigma.square(),
            "posterior_mean_coef2": ratio * (previous_sigma / sigma).square(),
            "posterior_variance": posterior_variance,
            "posterior_log_variance": after_first.log(),
            "fixed_large_variance": torch.cat([after_first[:1], betas[1:]]),
        }
        for name, table in tables.items():
            object.__setattr__(self, name, table)

    def _original(self, timestep: Tensor) -> Tensor:
        of_steps = self.process.timesteps
        return timestep if of_steps is None else (timestep * of_steps).round().long()

    def __len__(self) -> int:
        return len(self.levels)

    @property
    def original_length(self) -> int:
        """The T that `original_timesteps` count up to; 1 in continuous time."""
        return self.process.timesteps or 1

    @property
    def alphas_cumprod(self) -> Tensor:
        """abar, the squared signal."""
        return self.signal.square()

    @property
    def alphas_cumprod_prev(self) -> Tensor:
        """abar of the level below; 1 below the first."""
        return torch.cat([self.signal.new_ones(1), self.alphas_cumprod[:-1]])

    def at(self, t: Tensor | int) -> NoiseLevel:
        """The levels of index `t`, int64 () or (N,), each with its reverse step to index t - 1."""
        step = ReverseStep(
            self.posterior_mean_coef1[t],
            self.posterior_mean_coef2[t],
            self.posterior_variance[t],
            self.posterior_log_variance[t],
            self.betas[t].log(),
            self.fixed_large_variance[t].log(),
        )
        timestep = self.original_timesteps[t].double() / self.original_length
        return NoiseLevel(self.levels[t], timestep, self.signal[t], self.sigma[t], step)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule with its tables on `device`."""
        moved = object.__new__(NoiseSchedule)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            object.__setattr__(moved, field.name, value.to(device) if isinstance(value, Tensor) else value)
        return moved


def of_betas(betas: Tensor) -> NoiseSchedule:
    """The process of T steps whose steps add noise of variance `betas`, float64 (T,), increasing noise."""
    process = TabulatedProcess(torch.cumprod(1 - betas, dim=0))
    return NoiseSchedule(process, torch.arange(1, len(betas) + 1, dtype=torch.float64) / len(betas))


def cosine_schedule(timesteps: int, s: float = 0.008) -> NoiseSchedule:
    """The cosine schedule: alphas_cumprod(t) = cos^2((t/T + s) / (1 + s) * pi/2) (improved DDPM, equation 17).

    Raises:
        ValueError: `timesteps` is not positive.
    """
    _require_positive(timesteps)
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    alphas_cumprod = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return of_betas((1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=MAX_BETA))


def linear_schedule(timesteps: int) -> NoiseSchedule:
    """The linear schedule of DDPM, 1e-4 to 0.02 at T = 1000, scaled by 1000 / T so that any T > 1 ends in noise.

    The scaled betas pass 1 where T < 20, so they are capped at 0.999 as the cosine schedule's are.

    Raises:
        ValueError: `timesteps` is not positive.
    """
    _require_positive(timesteps)
    scale = 1000 / timesteps
    return of_betas(torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64).clamp(max=MAX_BETA))


SCHEDULES = {"cosine": cosine_schedule, "linear": linear_schedule}


def respace(schedule: NoiseSchedule, timesteps: Sequence[int] | Tensor) -> NoiseSchedule:
    """The grid that visits only `timesteps`: beta'_k = 1 - abar_k / abar_(k-1) (improved DDPM, equation 19).

    Args:
        schedule: the grid to thin out.
        timesteps: increasing indices into it, at least one; the network still receives the original timesteps.

    Raises:
        ValueError: `timesteps` is empty, not increasing, or out of range.
    """
    kept = torch.as_tensor(timesteps, device=schedule.levels.device)
    increasing = kept.ndim == 1 and len(kept) > 0 and not kept.is_floating_point() and bool((kept.diff() > 0).all())
    if not increasing or kept[0] < 0 or kept[-1] >= len(schedule):
        raise ValueError(f"respacing needs increasing timesteps, integers from 0 to {len(schedule) - 1}")
    return NoiseSchedule(schedule.process, schedule.levels[kept])


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


MOST_NOISE_TO_SIGNAL, LEAST_NOISE_TO_SIGNAL = 80.0, 0.002  # EDM's range (arXiv:2206.00364, table 1)


def uniform_levels(process: Process, steps: int) -> Tensor:
    """Evenly in t, up to the process's last level; of a process of T steps only its own levels, both ends included."""
    if process.timesteps is not None:
        kept = torch.tensor(evenly_spaced(process.timesteps, steps))
        return (kept.double() + 1) / process.timesteps
    return process.last_level * torch.arange(1, steps + 1, dtype=torch.float64) / steps


def karras_levels(process: Process, steps: int, rho: float = 7.0) -> Tensor:
    """Evenly in (sigma / signal)^(1/rho) (Karras et al. 2022, arXiv:2206.00364, equation 5)."""
    low, high = (bound ** (1 / rho) for bound in _noise_range(process))
    return process.level_of(_down_from(high, low, steps) ** rho)


def log_snr_levels(process: Process, steps: int) -> Tensor:
    """Evenly in the logarithm of signal / sigma (Lu et al. 2022, arXiv:2206.00927, section 3.3)."""
    low, high = map(math.log, _noise_range(process))
    return process.level_of(_down_from(high, low, steps).exp())


def _down_from(high: float, low: float, steps: int) -> Tensor:
    """So many values from `low` to `high`, evenly; one is `high`, where sampling starts."""
    return torch.linspace(high, low, steps, dtype=torch.float64).flip(0)


SPACINGS = {"uniform": uniform_levels, "karras": karras_levels, "log_snr": log_snr_levels}


def sampling_schedule(process: Process, steps: int, spacing: str = "uniform") -> NoiseSchedule:
    """The grid that a sampler walks in `steps` steps.

    Raises:
        ValueError: no steps, or more uniform ones than a process of T steps has.
    """
    _require_positive(steps)
    return NoiseSchedule(process, SPACINGS[spacing](process, steps))


def _noise_range(process: Process) -> tuple[float, float]:
    """The least and the most sigma / signal worth visiting. Beyond 80 nothing of an image is left to be seen, and
    methods that divide by the signal lose their digits."""
    first = 0.0 if process.timesteps is None else 1 / process.timesteps
    least, most = process.at(torch.tensor([first, process.last_level], dtype=torch.float64)).noise_to_signal.tolist()
    return max(least, LEAST_NOISE_TO_SIGNAL), min(most, MOST_NOISE_TO_SIGNAL)


def _require_positive(timesteps: int) -> None:
    if timesteps < 1:
        raise ValueError(f"a schedule needs at least 1 timestep, not {timesteps}")
