"""Guidance: denoisers that wrap a denoiser, and extrapolate from what a worse one says.

    D = D_worse + scale (D_good - D_worse)

Scale 1 is no guidance. An interval leaves the levels outside of it unguided, at the cost of the good denoiser alone
(Kynkaanniemi et al. 2024, arXiv:2404.07724); it is one of sigma / signal, the noise level of that paper. The noise
level is one for the whole batch, as in every sampler.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from improved_diffusion.diffusion.denoiser import Denoiser, Prediction
from improved_diffusion.diffusion.process import NoiseLevel

Interval = tuple[float, float]
EVERYWHERE: Interval = (0.0, math.inf)


class ClassifierFreeGuidance:
    """By the same network without the class: eps = eps(no class) + scale (eps(class) - eps(no class)) (Ho & Salimans
    2022, arXiv:2207.12598, equation 6, whose w is scale - 1). The variance is the conditional one's.

    Args:
        denoiser: one that was trained with class dropout.
        scale: the guidance scale.
        null_class: the label that stands for "no class".
        interval: of sigma / signal, ends included.
    """

    def __init__(self, denoiser: Denoiser, scale: float, null_class: int, interval: Interval = EVERYWHERE):
        self.denoiser = denoiser
        self.scale = scale
        self.null_class = null_class
        self.interval = interval

    def __call__(self, x_t: Tensor, level: NoiseLevel, y: Tensor | None) -> Prediction:
        if y is None:
            raise ValueError("guidance needs classes")
        if not is_within(level, self.interval):
            return self.denoiser(x_t, level, y)
        labels = torch.cat([y, torch.full_like(y, self.null_class)])
        both = self.denoiser(torch.cat([x_t, x_t]), level, labels)
        (x_start, worse_x_start), (eps, worse_eps) = both.x_start.chunk(2), both.eps.chunk(2)
        log_variance = None if both.log_variance is None else both.log_variance.chunk(2)[0]
        return extrapolate(Prediction(x_start, eps, log_variance), Prediction(worse_x_start, worse_eps), self.scale)


class AutoGuidance:
    """By a worse version of the model, smaller or less trained (Karras et al. 2024, arXiv:2406.02507, equation 2).

    Args:
        denoiser: the model.
        guide: the worse one, for the same images and classes.
        scale: the guidance scale.
        interval: of sigma / signal, ends included.
    """

    def __init__(self, denoiser: Denoiser, guide: Denoiser, scale: float, interval: Interval = EVERYWHERE):
        self.denoiser = denoiser
        self.guide = guide
        self.scale = scale
        self.interval = interval

    def __call__(self, x_t: Tensor, level: NoiseLevel, y: Tensor | None) -> Prediction:
        good = self.denoiser(x_t, level, y)
        if not is_within(level, self.interval):
            return good
        return extrapolate(good, self.guide(x_t, level, y), self.scale)


def extrapolate(good: Prediction, worse: Prediction, scale: float) -> Prediction:
    """`worse` + scale (`good` - `worse`), in x_0 and in eps, of which one is affine in the other. The log-variance is
    that of `good`."""
    return Prediction(
        worse.x_start + scale * (good.x_start - worse.x_start),
        worse.eps + scale * (good.eps - worse.eps),
        good.log_variance,
    )


def is_within(level: NoiseLevel, interval: Interval) -> bool:
    """Whether a level that is the same for the whole batch lies in an interval of sigma / signal."""
    if interval == EVERYWHERE:
        return True
    low, high = interval
    return low <= float(level.noise_to_signal) <= high
