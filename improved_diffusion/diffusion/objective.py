"""The training objectives: a product of what the error is measured in, how the levels are weighted, and which part the
variational bound has.

    mse      L_simple: the mean-square error of the network's prediction (DDPM, arXiv:2006.11239, equation 14)
    hybrid   L_simple + vlb_weight * L_t, where L_t teaches only the variance (improved DDPM, equation 16)
    vlb      L_t alone, for t drawn by importance (improved DDPM, section 3.3)

improved DDPM weighs the whole bound by 0.001; the bound is the sum of T terms and a training step sees one of them, so
the weight of the one term is T / 1000.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from improved_diffusion.diffusion.bound import bound_term
from improved_diffusion.diffusion.denoiser import NetworkDenoiser
from improved_diffusion.diffusion.parameterization import combine, determinant, q_sample
from improved_diffusion.diffusion.process import SIGMA_DATA, NoiseLevel

# For the change of loss space: x_0's error is divided by sigma for v, but by no less than this (JiT, arXiv:2511.13720),
# so that the levels at which the other space magnifies the error beyond all bounds do not make the loss by themselves.
LEAST_DIVISOR = 0.05
MOST_FACTOR = LEAST_DIVISOR**-2  # the same for weightings


@dataclass(frozen=True)
class LossTerms:
    """Per image, (N,), float32: the `loss` to minimise, the `mse`, and the term `vlb` of the bound (bits/dim)."""

    loss: Tensor
    mse: Tensor
    vlb: Tensor | None


# Weightings: of the mean-square error in x_0, as a function of the noise level.


def min_snr(level: NoiseLevel, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) (Hang et al. 2023, arXiv:2303.09556, section 3.4)."""
    return level.log_snr.exp().clamp(max=gamma)


def soft_min_snr(level: NoiseLevel, gamma: float = 4.0) -> Tensor:
    """SNR gamma / (SNR + gamma) (Crowson et al. 2024, arXiv:2401.11605, section 4.5)."""
    return gamma / (1 + gamma * (-level.log_snr).exp())


def edm(level: NoiseLevel) -> Tensor:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2, which makes the error of EDM's F count alike at every level
    (Karras et al. 2022, arXiv:2206.00364, table 1)."""
    return level.log_snr.exp() + SIGMA_DATA**-2


def sigmoid(level: NoiseLevel, bias: float = -1.0) -> Tensor:
    """sigmoid(bias - log SNR) of the error in eps (Kingma & Gao 2023, arXiv:2303.00848; Hoogeboom et al. 2024,
    arXiv:2410.19324, equation 7)."""
    return torch.sigmoid(bias - level.log_snr) * level.log_snr.exp()


Weighting = Callable[[NoiseLevel], Tensor]
WEIGHTINGS: dict[str, Weighting | None] = {
    "uniform": None,  # every level alike, in the loss space's own unit
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "edm": edm,
    "sigmoid": sigmoid,
}


@dataclass(frozen=True)
class Objective:
    """(denoiser, x_start, level, y, noise) -> the terms of each image.

    `loss_space` is the parameterization in which the mean-square error is taken; None for the one that the network
    predicts. `mean_weight` is that of the mean-square error and `vlb_weight` that of the bound's term; with both, the
    mean is detached inside the bound, so that the bound teaches only the variance. With a bound the levels must be on
    a grid.
    """

    loss_space: str | None = None
    weighting: str = "uniform"
    mean_weight: float = 1.0
    vlb_weight: float = 0.0

    def __call__(
        self, denoiser: NetworkDenoiser, x_start: Tensor, level: NoiseLevel, y: Tensor | None, noise: Tensor
    ) -> LossTerms:
        x_t = q_sample(level, x_start, noise)
        predicted, v = denoiser.run_network(x_t, level, y)
        for_mean = predicted if self.mean_weight else predicted.detach()
        mse = self._mean_square_error(denoiser.prediction, level, for_mean, x_start, noise)
        if not self.vlb_weight:
            return LossTerms(self.mean_weight * mse, mse, None)
        for_bound = predicted.detach() if self.mean_weight else predicted
        vlb = bound_term(level, x_start, x_t, denoiser.interpret(x_t, level, for_bound, v))
        return LossTerms(self.mean_weight * mse + self.vlb_weight * vlb, mse, vlb)

    def _mean_square_error(
        self, prediction: str, level: NoiseLevel, predicted: Tensor, x_start: Tensor, noise: Tensor
    ) -> Tensor:
        """That of the prediction, brought by one factor to the loss space and its weighting. (N,)"""
        error = predicted - combine(prediction, level, x_start, noise)
        mse = error.square().flatten(1).mean(1)
        factor = self._factor(prediction, level)
        return mse if factor is None else mse * factor.to(mse)

    def _factor(self, prediction: str, level: NoiseLevel) -> Tensor | None:
        weighting = WEIGHTINGS[self.weighting]
        if weighting is None and self.loss_space in (None, prediction):
            return None
        divisor = determinant(prediction, level)
        if weighting is None:
            wanted = determinant(self.loss_space or prediction, level)
            return (wanted / divisor.clamp(min=LEAST_DIVISOR)).square()
        to_x_start = level.sigma / divisor if prediction != "x_start" else torch.ones_like(divisor)
        return (weighting(level) * to_x_start.square()).clamp(max=MOST_FACTOR)


def named_objective(
    name: str, *, timesteps: int | None, vlb_weight: float, loss_space: str | None = None, weighting: str = "uniform"
) -> Objective:
    """The product called `name`: mse, hybrid (with `vlb_weight`), or vlb, T times the term, which at uniform t is an
    unbiased estimate of the sum over t."""
    if name == "vlb":
        if timesteps is None:
            raise ValueError("the vlb objective is a sum over T steps: there are none in continuous time")
        return Objective(mean_weight=0.0, vlb_weight=float(timesteps))
    return Objective(loss_space, weighting, vlb_weight=vlb_weight if name == "hybrid" else 0.0)
