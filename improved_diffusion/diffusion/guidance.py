"""Guidance: denoisers that wrap a denoiser."""

from __future__ import annotations

import torch
from torch import Tensor

from improved_diffusion.diffusion.denoiser import Denoiser, Prediction


class ClassifierFreeGuidance:
    """eps = eps(no class) + scale * (eps(class) - eps(no class)) (Ho & Salimans 2022, arXiv:2207.12598, equation 6).

    In that paper's notation scale = 1 + w, so that 1 is no guidance. The variance is the conditional one's.

    Args:
        denoiser: one that was trained with class dropout.
        scale: the guidance scale.
        null_class: the label that stands for "no class".
    """

    def __init__(self, denoiser: Denoiser, scale: float, null_class: int):
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.scale = scale
        self.null_class = null_class

    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Prediction:
        if y is None:
            raise ValueError("guidance needs classes")
        labels = torch.cat([y, torch.full_like(y, self.null_class)])
        both = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), labels)
        return Prediction(
            self._extrapolate(both.x_start),  # linear in eps, so the same combination
            self._extrapolate(both.eps),
            both.log_variance.chunk(2)[0],
        )

    def _extrapolate(self, both: Tensor) -> Tensor:
        with_class, without_class = both.chunk(2)
        return without_class + self.scale * (with_class - without_class)
