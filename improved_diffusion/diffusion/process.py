"""The forward process: how much signal and how much noise there is in x_t, at any noise level t in [0, 1].

    x_t = signal(t) x_0 + sigma(t) eps,    t = 0: the image;  t = 1: (almost) pure noise

A process is these two functions. Their ratio sigma / signal grows with t; it is the noise level of EDM's papers (Karras
et al. 2022, arXiv:2206.00364), in which processes can be compared. Levels and what follows from them are float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SIGMA_DATA = 0.5  # standard deviation of images on [-1, 1], as EDM takes it (arXiv:2206.00364, table 1)


@dataclass(frozen=True)
class ReverseStep:
    """q(x_s | x_t, x_0) = N(mean_x_start x_0 + mean_x_t x_t, variance), for the step from t to a lower level s.

    `forward_variance` is that of q(x_t | x_s): beta_t, where s is the step before. All are float64, of the shape of t.
    The logarithms are finite for s = 0 too, where the variance is 0: see `NoiseSchedule`.
    """

    mean_x_start: Tensor
    mean_x_t: Tensor
    variance: Tensor
    log_variance: Tensor
    log_forward_variance: Tensor
    log_fixed_large: Tensor


@dataclass(frozen=True)
class NoiseLevel:
    """One level for a whole batch, shape (), or one for each image, shape (N,). All float64.

    `t` is in [0, 1], `timestep` is t as networks are told it. `step` leads to the next level of a grid, if the level is
    on one.
    """

    t: Tensor
    timestep: Tensor
    signal: Tensor
    sigma: Tensor
    step: ReverseStep | None = None

    @property
    def reverse_step(self) -> ReverseStep:
        """`step`, for who needs one. Raises ValueError where the level is on no grid."""
        if self.step is None:
            raise ValueError("this noise level is on no grid: there is no reverse step from it")
        return self.step

    @property
    def noise_to_signal(self) -> Tensor:
        """sigma / signal, infinite where there is no signal."""
        return self.sigma / self.signal

    @property
    def initial_std(self) -> Tensor:
        """Standard deviation of the noise from which sampling starts at this level: that of x_t, for data that
        disappear in it."""
        return self.sigma.clamp(min=1)

    @property
    def log_snr(self) -> Tensor:
        """2 ln(signal / sigma) (Kingma et al. 2021, arXiv:2107.00630, equation 3)."""
        return 2 * (self.signal.log() - self.sigma.log())


def like(value: Tensor, x: Tensor) -> Tensor:
    """`value`, () or (N,), shaped to multiply `x`, (N, ...), and rounded to its type. One value stays on its device:
    from the CPU it enters any kernel as an argument."""
    value = value.to(x.dtype)
    return value if value.ndim == 0 else value.view(-1, *(1,) * (x.ndim - 1))


class Process(Protocol):
    """A forward process.

    `last_level` is the noisiest level to train on and to sample from: below 1 where there is no signal at 1, which
    some parameterizations would have to divide by. `timesteps` is T where only the levels 1/T, 2/T, ... 1 are trained.
    """

    @property
    def last_level(self) -> float: ...

    @property
    def timesteps(self) -> int | None: ...

    def at(self, t: Tensor) -> NoiseLevel:
        """The level `t`, float64 in [0, 1]."""
        ...

    def level_of(self, noise_to_signal: Tensor) -> Tensor:
        """The t at which sigma / signal has this value; the nearest level for values out of range."""
        ...


class _Continuous(ABC):
    timesteps = None

    def __init__(self) -> None:
        one = torch.ones((), dtype=torch.float64)
        self.last_level = float(self.level_of(one * self.most_noise_to_signal))

    most_noise_to_signal = 1000.0

    @abstractmethod
    def signal_and_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def level_of(self, noise_to_signal: Tensor) -> Tensor: ...

    def at(self, t: Tensor) -> NoiseLevel:
        return NoiseLevel(t, t, *self.signal_and_sigma(t))


class CosineProcess(_Continuous):
    """signal = cos((t + s) / (1 + s) pi/2) / cos(s / (1 + s) pi/2), variance preserving (improved DDPM,
    arXiv:2102.09672, equation 17)."""

    offset = 0.008

    def signal_and_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        s = self.offset
        angle, first = (t + s) / (1 + s) * math.pi / 2, s / (1 + s) * math.pi / 2
        signal = torch.cos(angle) / math.cos(first)
        # 1 - signal^2 by sums of angles: the difference itself has no digits left near t = 0.
        sigma = torch.sqrt(torch.sin(angle - first) * torch.sin(angle + first)) / math.cos(first)
        return signal, sigma

    def level_of(self, noise_to_signal: Tensor) -> Tensor:
        s = self.offset
        first = math.cos(s / (1 + s) * math.pi / 2)
        angle = torch.acos(first / torch.sqrt(1 + noise_to_signal.square()))
        return (angle * 2 / math.pi * (1 + s) - s).clamp(0, 1)


class LinearProcess(_Continuous):
    """d x = -beta(t)/2 x dt + sqrt(beta(t)) dw with beta from 0.1 to 20, the limit of DDPM's linear schedule for many
    steps; variance preserving (Song et al. 2021, arXiv:2011.13456, equation 33)."""

    beta_min, beta_max = 0.1, 20.0

    def signal_and_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integral = self.beta_min * t + (self.beta_max - self.beta_min) / 2 * t.square()
        return torch.exp(-integral / 2), torch.sqrt(-torch.expm1(-integral))

    def level_of(self, noise_to_signal: Tensor) -> Tensor:
        # Bounded, for infinite noise would be infinity over infinity.
        integral, slope = torch.log1p(noise_to_signal.clamp(max=1e9).square()), self.beta_max - self.beta_min
        root = torch.sqrt(self.beta_min**2 + 2 * slope * integral)
        return (2 * integral / (self.beta_min + root)).clamp(0, 1)


class RectifiedFlow(_Continuous):
    """signal = 1 - t, sigma = t: straight lines (Liu et al. 2022, arXiv:2209.03003; Lipman et al. 2022,
    arXiv:2210.02747)."""

    def signal_and_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def level_of(self, noise_to_signal: Tensor) -> Tensor:
        return 1 / (1 + 1 / noise_to_signal)


class VarianceExploding(_Continuous):
    """signal = 1, ln sigma linear in t, from 0.002 to 80: EDM's range (arXiv:2206.00364, table 1). A network is told t,
    which is EDM's c_noise = ln(sigma) / 4 but for scale and offset."""

    sigma_min, sigma_max = 0.002, 80.0
    most_noise_to_signal = sigma_max

    def signal_and_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def level_of(self, noise_to_signal: Tensor) -> Tensor:
        octaves = torch.log(noise_to_signal / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)
        return octaves.clamp(0, 1)


class TabulatedProcess:
    """A process of T steps, given by its alphas_cumprod, variance preserving. t = k / T is step k - 1 of the table.

    Between the steps ln(sigma / signal) is linear in t, so that samplers can also stop there; below the first step
    sigma / signal is.
    """

    last_level = 1.0

    def __init__(self, alphas_cumprod: Tensor):
        self.alphas_cumprod = alphas_cumprod
        self.timesteps = len(alphas_cumprod)
        self._log_ratio = ((1 - alphas_cumprod).log() - alphas_cumprod.log()) / 2

    def at(self, t: Tensor) -> NoiseLevel:
        position = t * self.timesteps - 1
        nearest = position.round().long().clamp(0, self.timesteps - 1)
        abar = self.alphas_cumprod[nearest]
        signal, sigma = abar.sqrt(), (1 - abar).sqrt()
        between = (position - nearest).abs() > 1e-6
        if bool(between.any()):
            angle = torch.atan(self._ratio_between(position))
            signal, sigma = torch.where(between, angle.cos(), signal), torch.where(between, angle.sin(), sigma)
            position = torch.where(between, position, nearest.double())
        else:
            position = nearest.double()
        return NoiseLevel(t, position / self.timesteps, signal, sigma)

    def _ratio_between(self, position: Tensor) -> Tensor:
        lower = position.floor().long().clamp(0, self.timesteps - 1)
        upper = (lower + 1).clamp(max=self.timesteps - 1)
        ratio = torch.exp(torch.lerp(self._log_ratio[lower], self._log_ratio[upper], position - lower))
        return torch.where(position < 0, (position + 1) * self._log_ratio[0].exp(), ratio)

    def level_of(self, noise_to_signal: Tensor) -> Tensor:
        log_ratio = noise_to_signal.log().clamp(max=float(self._log_ratio[-1]))
        upper = torch.searchsorted(self._log_ratio, log_ratio).clamp(1, max(1, self.timesteps - 1))
        upper = upper.clamp(max=self.timesteps - 1)
        lower = (upper - 1).clamp(min=0)
        rise = (self._log_ratio[upper] - self._log_ratio[lower]).clamp(min=1e-300)
        position = lower + (log_ratio - self._log_ratio[lower]) / rise
        below = noise_to_signal / self._log_ratio[0].exp() - 1
        return (torch.where(below <= 0, below, position) + 1) / self.timesteps


PROCESSES: dict[str, Callable[[], Process]] = {
    "cosine": CosineProcess,
    "linear": LinearProcess,
    "flow": RectifiedFlow,
    "ve": VarianceExploding,
}
