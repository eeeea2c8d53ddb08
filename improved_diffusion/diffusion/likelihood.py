"""Divergences and likelihoods, in nats; `to_bits_per_dim` turns them into the unit that papers report."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EDGE = 0.999  # pixels beyond it are the levels 0 and 255, whose bins reach to infinity
HALF_LEVEL = 1 / 255  # half the distance of two grey levels on [-1, 1]


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) in nats, elementwise."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (torch.expm1(ratio) - ratio + (mean1 - mean2).square() * torch.exp(-log_variance2))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the mass that a Gaussian gives to the grey level of each pixel, in nats, elementwise (DDPM, equation 13).

    Args:
        x: images on [-1, 1] whose values are grey levels, k / 127.5 - 1.
        mean: of the Gaussian, same shape.
        log_variance: of the Gaussian, same shape.
    """
    inverse_std = torch.exp(-0.5 * log_variance)
    upper = (x - mean + HALF_LEVEL) * inverse_std
    lower = (x - mean - HALF_LEVEL) * inverse_std
    log_below_upper = torch.special.log_ndtr(upper)
    log_above_lower = torch.special.log_ndtr(-lower)
    # The mass between is a difference of two tails. Taken on the side where they are small, and as logarithms, it keeps
    # its digits however far the level is from the mean; its gradient in float32 does so to 300 standard deviations.
    flip = x > mean
    log_near = torch.special.log_ndtr(torch.where(flip, -lower, upper))
    log_far = torch.special.log_ndtr(torch.where(flip, -upper, lower))
    log_between = log_near + torch.log(-torch.expm1(log_far - log_near).clamp(max=-1e-12))
    return torch.where(x < -EDGE, log_below_upper, torch.where(x > EDGE, log_above_lower, log_between))


def to_bits_per_dim(nats: Tensor) -> Tensor:
    """The mean over all but the first dimension, in bits: (N, C, H, W) nats -> (N,) bits/dim."""
    return nats.flatten(1).mean(1) / math.log(2)
