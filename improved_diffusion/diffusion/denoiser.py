"""The one contract between a network and the samplers: (x_t, t, y) -> what x_0, eps and the log-variance are.

A sampler never sees a network. `DiscreteDenoiser` adapts a DDPM network; anything else with a `schedule` that returns a
`Prediction` works in every sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from improved_diffusion.diffusion import process
from improved_diffusion.diffusion.schedule import NoiseSchedule

Network = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class Prediction:
    """What a denoiser makes of x_t. All (N, C, H, W).

    `log_variance` is that of p(x_{t-1} | x_t), for the steps of the denoiser's schedule.
    """

    x_start: Tensor
    eps: Tensor
    log_variance: Tensor


class Denoiser(Protocol):
    """x_t (N, C, H, W), t int64 (N,) an index into `schedule`, y int64 (N,) classes or None -> Prediction."""

    schedule: NoiseSchedule

    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Prediction: ...


class DiscreteDenoiser:
    """A network trained on the timesteps of a discrete schedule.

    Args:
        network: (x_t, t, y) -> (N, C or 2C, H, W); t is float, the original timestep on the scale 0..timestep_range.
        schedule: the process, respaced or not.
        prediction: what the network's first C channels are: `eps`, `x_start` or `v`.
        variance: `fixed_small`, `fixed_large`, or `learned_range` for a network with 2C channels.
        timestep_range: what T is for the network, whatever it is for the schedule.
    """

    def __init__(
        self, network: Network, schedule: NoiseSchedule, prediction: str, variance: str, timestep_range: float = 1000
    ):
        if prediction not in ("eps", "x_start", "v"):
            raise ValueError(f"prediction must be eps, x_start or v, not {prediction!r}")
        if variance not in ("fixed_small", "fixed_large", "learned_range"):
            raise ValueError(f"variance must be fixed_small, fixed_large or learned_range, not {variance!r}")
        self.network = network
        self.schedule = schedule
        self.prediction = prediction
        self.variance = variance
        self.timestep_range = timestep_range

    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Prediction:
        return self.interpret(x_t, t, *self.run_network(x_t, t, y))

    def run_network(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The network's own output in float32: the predicted quantity, and the variance's v where it is learned."""
        timesteps = self.schedule.original_timesteps[t].float() * (self.timestep_range / self.schedule.original_length)
        output = self.network(x_t, timesteps, y)
        if self.variance == "learned_range":
            predicted, v = output.float().chunk(2, dim=1)
            return predicted, v
        return output.float(), None

    def interpret(self, x_t: Tensor, t: Tensor, predicted: Tensor, v: Tensor | None) -> Prediction:
        """x_0, eps and the log-variance that the network's output stands for."""
        schedule = self.schedule
        if self.prediction == "eps":
            x_start, eps = process.x_start_from_eps(schedule, x_t, t, predicted), predicted
        elif self.prediction == "x_start":
            x_start, eps = predicted, process.eps_from_x_start(schedule, x_t, t, predicted)
        else:
            x_start = process.x_start_from_v(schedule, x_t, t, predicted)
            eps = process.eps_from_v(schedule, x_t, t, predicted)
        if v is None:
            log_variance = process.fixed_log_variance(schedule, self.variance, t, x_t)
        else:
            log_variance = process.learned_range_log_variance(schedule, t, v)
        return Prediction(x_start, eps, log_variance)

    def target(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should have predicted for x_t made from `x_start` and `noise`."""
        if self.prediction == "eps":
            return noise
        if self.prediction == "x_start":
            return x_start
        return process.v_from_x_start_and_eps(self.schedule, x_start, t, noise)
