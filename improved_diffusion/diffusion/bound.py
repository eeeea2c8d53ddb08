"""The variational bound on -log p(x_0), term by term, in bits/dim (DDPM, equation 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from improved_diffusion.diffusion.denoiser import Denoiser, Prediction
from improved_diffusion.diffusion.likelihood import discretized_gaussian_log_likelihood, gaussian_kl, to_bits_per_dim
from improved_diffusion.diffusion.parameterization import q_sample
from improved_diffusion.diffusion.process import NoiseLevel, like
from improved_diffusion.diffusion.schedule import NoiseSchedule


def posterior_mean(level: NoiseLevel, x_start: Tensor, x_t: Tensor) -> Tensor:
    """The mean of q(x_s | x_t, x_0), for the reverse step of `level` (DDPM, equation 7)."""
    step = level.reverse_step
    return like(step.mean_x_start, x_t) * x_start + like(step.mean_x_t, x_t) * x_t


def bound_term(level: NoiseLevel, x_start: Tensor, x_t: Tensor, prediction: Prediction) -> Tensor:
    """L_t of each image: the decoder's -log p(x_0 | x_t) in the step to the image, else KL(q(x_s | x_t, x_0) || p).
    (N,) bits/dim.

    Under a cosine schedule the term at t = T-1 is about 721 bits/dim for a network that predicts eps = 0, because the
    last beta is capped, which leaves 1 / sqrt(abar_T) in the thousands. It is near 0 once the network has learnt
    eps = x_t there. Whoever averages over t must not let that one term drown the others.
    """
    step, log_variance = level.reverse_step, prediction.known_log_variance
    mean, true_mean = (posterior_mean(level, x_0, x_t) for x_0 in (prediction.x_start, x_start))
    divergence = gaussian_kl(true_mean, like(step.log_variance, x_t), mean, log_variance)
    to_image = (step.variance == 0).to(x_t.device).expand(len(x_t))
    # In other steps the decoder is not used, but a NaN in its gradient would be: there it gets harmless arguments.
    decodes = to_image.view(-1, *(1,) * (x_t.ndim - 1))
    decoder = -discretized_gaussian_log_likelihood(
        x_start, torch.where(decodes, mean, x_start), torch.where(decodes, log_variance, 0.0)
    )
    return torch.where(to_image, to_bits_per_dim(decoder), to_bits_per_dim(divergence))


def prior_term(schedule: NoiseSchedule, x_start: Tensor) -> Tensor:
    """L_T of each image: KL(q(x_T | x_0) || N(0, initial_std^2 I)). (N,) bits/dim."""
    last = schedule.at(-1)
    mean = like(last.signal, x_start) * x_start
    zeros = torch.zeros_like(x_start)  # also what brings the levels to its device
    log_variance, of_prior = (like(2 * std.log(), x_start) + zeros for std in (last.sigma, last.initial_std))
    return to_bits_per_dim(gaussian_kl(mean, log_variance, zeros, of_prior))


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
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_start: Tensor,
    y: Tensor | None,
    draw_noise: Callable[[], Tensor],
) -> VariationalBound:
    """The whole bound of each image, by visiting every level of the schedule once.

    Args:
        denoiser: the model.
        schedule: the T steps.
        x_start: (N, C, H, W), images on [-1, 1].
        y: (N,) classes, or None.
        draw_noise: returns fresh standard normal noise of the shape of `x_start`; called once for each timestep,
            from T-1 down to 0.
    """
    vlb, xstart_mse, mse = [], [], []
    for t in reversed(range(len(schedule))):
        level = schedule.at(t)
        noise = draw_noise()
        x_t = q_sample(level, x_start, noise)
        prediction = denoiser(x_t, level, y)
        vlb.append(bound_term(level, x_start, x_t, prediction))
        xstart_mse.append((prediction.x_start - x_start).square().flatten(1).mean(1))
        mse.append((prediction.eps - noise).square().flatten(1).mean(1))
    terms, x_start_errors, eps_errors = (torch.stack(column[::-1], dim=1) for column in (vlb, xstart_mse, mse))
    prior = prior_term(schedule, x_start)
    return VariationalBound(terms, x_start_errors, eps_errors, prior, terms.sum(1) + prior)
