"""The variational bound on -log p(x_0), term by term, in bits/dim (DDPM, equation 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from improved_diffusion.diffusion import process
from improved_diffusion.diffusion.denoiser import Denoiser, Prediction
from improved_diffusion.diffusion.likelihood import discretized_gaussian_log_likelihood, gaussian_kl, to_bits_per_dim
from improved_diffusion.diffusion.schedule import NoiseSchedule


def bound_term(schedule: NoiseSchedule, x_start: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
    """L_t of each image: the decoder's -log p(x_0 | x_1) at t = 0, else KL(q(x_{t-1} | x_t, x_0) || p). (N,) bits/dim.

    Under a cosine schedule the term at t = T-1 is about 721 bits/dim for a network that predicts eps = 0, because the
    last beta is capped, which leaves 1 / sqrt(abar_T) in the thousands. It is near 0 once the network has learnt
    eps = x_t there. Whoever averages over t must not let that one term drown the others.
    """
    mean = process.q_posterior_mean(schedule, prediction.x_start, x_t, t)
    true_mean = process.q_posterior_mean(schedule, x_start, x_t, t)
    true_log_variance = process.at(schedule.posterior_log_variance, t, x_t)
    divergence = gaussian_kl(true_mean, true_log_variance, mean, prediction.log_variance)
    # Where t > 0 the decoder is not used, but a NaN in its gradient would be: there it gets harmless arguments.
    first = (t == 0).view(-1, *(1,) * (x_t.ndim - 1))
    decoder = -discretized_gaussian_log_likelihood(
        x_start, torch.where(first, mean, x_start), torch.where(first, prediction.log_variance, 0.0)
    )
    return torch.where(t == 0, to_bits_per_dim(decoder), to_bits_per_dim(divergence))


def prior_term(schedule: NoiseSchedule, x_start: Tensor) -> Tensor:
    """L_T of each image: KL(q(x_T | x_0) || N(0, I)). (N,) bits/dim."""
    last = schedule.alphas_cumprod[-1]
    mean = last.sqrt().to(x_start.dtype) * x_start
    log_variance = torch.log1p(-last).to(x_start.dtype).expand_as(x_start)
    zeros = torch.zeros_like(x_start)
    return to_bits_per_dim(gaussian_kl(mean, log_variance, zeros, zeros))


@dataclass(frozen=True)
class VariationalBound:
    """The bound of N images. `vlb`, `xstart_mse` and `mse` (of eps) are (N, T), column t for timestep t;
    `prior` and `total` = vlb.sum(1) + prior are (N,). The bounds are in bits/dim."""

    vlb: Tensor
    xstart_mse: Tensor
    mse: Tensor
    prior: Tensor
    total: Tensor


@torch.no_grad()
def variational_bound(
    denoiser: Denoiser, x_start: Tensor, y: Tensor | None, draw_noise: Callable[[], Tensor]
) -> VariationalBound:
    """The whole bound of each image, by visiting every timestep of the denoiser's schedule once.

    Args:
        denoiser: the model.
        x_start: (N, C, H, W), images on [-1, 1].
        y: (N,) classes, or None.
        draw_noise: returns fresh standard normal noise of the shape of `x_start`; called once for each timestep,
            from T-1 down to 0.
    """
    schedule = denoiser.schedule
    vlb, xstart_mse, mse = [], [], []
    for step in reversed(range(len(schedule))):
        t = torch.full((len(x_start),), step, device=x_start.device)
        noise = draw_noise()
        x_t = process.q_sample(schedule, x_start, t, noise)
        prediction = denoiser(x_t, t, y)
        vlb.append(bound_term(schedule, x_start, x_t, t, prediction))
        xstart_mse.append((prediction.x_start - x_start).square().flatten(1).mean(1))
        mse.append((prediction.eps - noise).square().flatten(1).mean(1))
    terms = [torch.stack(column[::-1], dim=1) for column in (vlb, xstart_mse, mse)]
    prior = prior_term(schedule, x_start)
    return VariationalBound(*terms, prior, terms[0].sum(1) + prior)
