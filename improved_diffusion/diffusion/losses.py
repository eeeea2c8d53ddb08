"""The training objectives. Each takes (denoiser, x_start, t, y, noise) and returns the terms of each image.

    mse      L_simple: the mean-square error of the network's prediction (DDPM, equation 14)
    hybrid   L_simple + vlb_weight * L_t, where L_t teaches only the variance (improved DDPM, equation 16)
    vlb      L_t alone, for t drawn by importance (improved DDPM, section 3.3)

improved DDPM weighs the whole bound by 0.001; the bound is the sum of T terms and a training step sees one of them, so
the weight of the one term is T / 1000.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from improved_diffusion.diffusion import process
from improved_diffusion.diffusion.bound import bound_term
from improved_diffusion.diffusion.denoiser import DiscreteDenoiser


@dataclass(frozen=True)
class LossTerms:
    """Per image, (N,), float32: the `loss` to minimise, the `mse`, and the term `vlb` of the bound (bits/dim)."""

    loss: Tensor
    mse: Tensor
    vlb: Tensor | None


Loss = Callable[[DiscreteDenoiser, Tensor, Tensor, "Tensor | None", Tensor], LossTerms]


def mse_loss(denoiser: DiscreteDenoiser, x_start: Tensor, t: Tensor, y: Tensor | None, noise: Tensor) -> LossTerms:
    """The mean-square error; the variance is not trained."""
    x_t = process.q_sample(denoiser.schedule, x_start, t, noise)
    predicted, _ = denoiser.run_network(x_t, t, y)
    mse = _mean_square(predicted - denoiser.target(x_start, t, noise))
    return LossTerms(mse, mse, None)


def hybrid_loss(
    denoiser: DiscreteDenoiser, x_start: Tensor, t: Tensor, y: Tensor | None, noise: Tensor, *, vlb_weight: float
) -> LossTerms:
    """The mean-square error trains the mean, the bound trains the variance: inside the bound the mean is detached."""
    x_t = process.q_sample(denoiser.schedule, x_start, t, noise)
    predicted, v = denoiser.run_network(x_t, t, y)
    mse = _mean_square(predicted - denoiser.target(x_start, t, noise))
    vlb = bound_term(denoiser.schedule, x_start, x_t, t, denoiser.interpret(x_t, t, predicted.detach(), v))
    return LossTerms(mse + vlb_weight * vlb, mse, vlb)


def vlb_loss(denoiser: DiscreteDenoiser, x_start: Tensor, t: Tensor, y: Tensor | None, noise: Tensor) -> LossTerms:
    """The bound alone, T times its term at t: an unbiased estimate of the sum over t where t is uniform."""
    x_t = process.q_sample(denoiser.schedule, x_start, t, noise)
    predicted, v = denoiser.run_network(x_t, t, y)
    mse = _mean_square(predicted.detach() - denoiser.target(x_start, t, noise))
    vlb = bound_term(denoiser.schedule, x_start, x_t, t, denoiser.interpret(x_t, t, predicted, v))
    return LossTerms(vlb * len(denoiser.schedule), mse, vlb)


def make_loss(name: str, vlb_weight: float) -> Loss:
    """The objective called `name`: mse, hybrid (with `vlb_weight`) or vlb."""
    return {"mse": mse_loss, "hybrid": partial(hybrid_loss, vlb_weight=vlb_weight), "vlb": vlb_loss}[name]


def _mean_square(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(1)
