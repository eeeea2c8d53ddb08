"""The one contract between a network and the samplers: (x_t, noise level, y) -> what x_0, eps and the log-variance are.

A sampler never sees a network. `NetworkDenoiser` adapts a network; anything else that returns a `Prediction` works in
every sampler.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from improved_diffusion.diffusion.parameterization import PARAMETERIZATIONS, eps_from_x_start, resolve
from improved_diffusion.diffusion.process import SIGMA_DATA, NoiseLevel, like

VARIANCES = ("fixed_small", "fixed_large", "learned_range")

Network = Callable[..., Tensor]  # (x_t, timestep, y), and further conditions by name


@dataclass(frozen=True)
class Prediction:
    """What a denoiser makes of x_t. All (N, C, H, W).

    `log_variance` is that of p(x_s | x_t), for the reverse step of the noise level; None where it has none.
    """

    x_start: Tensor
    eps: Tensor
    log_variance: Tensor | None = None

    @property
    def known_log_variance(self) -> Tensor:
        """`log_variance`, for who needs one. Raises ValueError where there is none."""
        if self.log_variance is None:
            raise ValueError("this prediction has no variance: its noise level has no reverse step")
        return self.log_variance


class Denoiser(Protocol):
    """x_t (N, C, H, W), a noise level of shape () or (N,), y int64 (N,) classes or None -> Prediction."""

    def __call__(self, x_t: Tensor, level: NoiseLevel, y: Tensor | None) -> Prediction: ...


class NetworkDenoiser:
    """A trained network.

    Args:
        network: (x_t, timestep, y) -> (N, C or 2C, H, W); timestep is float (N,), on the scale 0..timestep_range.
        prediction: what the network's first C channels are: a name in PARAMETERIZATIONS.
        variance: `fixed_small`, `fixed_large`, or `learned_range` for a network with 2C channels.
        timestep_range: what t = 1 is for the network.
        scale_input: divide x_t by its standard deviation, as EDM does: for processes whose noise is not bounded.
    """

    def __init__(
        self,
        network: Network,
        prediction: str,
        variance: str,
        timestep_range: float = 1000,
        *,
        scale_input: bool = False,
    ):
        if prediction not in PARAMETERIZATIONS:
            raise ValueError(f"prediction must be one of {', '.join(PARAMETERIZATIONS)}, not {prediction!r}")
        if variance not in VARIANCES:
            raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, not {variance!r}")
        self.network = network
        self.prediction = prediction
        self.variance = variance
        self.timestep_range = timestep_range
        self.scale_input = scale_input

    def told(self, **conditions: Tensor) -> NetworkDenoiser:
        """The same denoiser, whose network is also told these conditions of the images at hand."""
        copied = copy.copy(self)
        copied.network = functools.partial(self.network, **conditions)
        return copied

    def __call__(self, x_t: Tensor, level: NoiseLevel, y: Tensor | None) -> Prediction:
        return self.interpret(x_t, level, *self.run_network(x_t, level, y))

    def run_network(self, x_t: Tensor, level: NoiseLevel, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The network's own output in float32: the predicted quantity, and the variance's v where it is learned."""
        # Added, one level for the whole batch enters a kernel as an argument; a copy to a GPU would wait for the GPU.
        timestep = x_t.new_zeros(len(x_t), dtype=torch.float32) + (level.timestep * self.timestep_range).float()
        if self.scale_input:
            deviation = torch.sqrt((level.signal * SIGMA_DATA).square() + level.sigma.square())
            x_t = x_t / like(deviation, x_t)
        output = self.network(x_t, timestep, y)
        if self.variance == "learned_range":
            predicted, v = output.float().chunk(2, dim=1)
            return predicted, v
        return output.float(), None

    def interpret(self, x_t: Tensor, level: NoiseLevel, predicted: Tensor, v: Tensor | None) -> Prediction:
        """x_0, eps and the log-variance that the network's output stands for."""
        x_start, eps = resolve(self.prediction, level, x_t, predicted)
        return Prediction(x_start, eps, None if level.step is None else self._log_variance(level, x_t, v))

    def _log_variance(self, level: NoiseLevel, x_t: Tensor, v: Tensor | None) -> Tensor:
        """That of beta~ or of beta; or between them, at v = -1 and v = 1 (improved DDPM, equation 15).

        v is not clamped: it may pass these bounds.
        """
        step = level.reverse_step
        if v is None:
            fixed = step.log_variance if self.variance == "fixed_small" else step.log_fixed_large
            return like(fixed, x_t) + torch.zeros_like(x_t)  # on its device
        fraction = (v + 1) / 2
        return fraction * like(step.log_forward_variance, v) + (1 - fraction) * like(step.log_variance, v)


class ClippedDenoiser:
    """`denoiser` with its x_0 clamped to [-1, 1], the range of images, and eps to match."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser

    def __call__(self, x_t: Tensor, level: NoiseLevel, y: Tensor | None) -> Prediction:
        prediction = self.denoiser(x_t, level, y)
        x_start = prediction.x_start.clamp(-1, 1)
        return Prediction(x_start, eps_from_x_start(level, x_t, x_start), prediction.log_variance)
