"""Scores of generated pictures from their embeddings: one value for each picture, so that a mean has an interval.

All embeddings are float32 (N, d), of length 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from improved_diffusion.metrics.estimate import Estimate, Influence, bootstrap_interval


def prompt_match(pictures: Tensor, texts: Tensor) -> Tensor:
    """CLIP-T (Ruiz et al. 2022, DreamBooth, section 4.1): the cosine of each picture with its own text, (N,)."""
    return (pictures * texts).sum(dim=1)


def fidelity(pictures: Tensor, references: Tensor) -> Tensor:
    """CLIP-I or DINO (same section): each picture's mean cosine with the M references, (N,)."""
    return pictures @ references.mean(dim=0)


def copying(pictures: Tensor, training: Tensor) -> Tensor:
    """How much closer each picture is to a training image than these are to each other, (N,), from 0 to 1.

        max(0, 1 - d / D),    d: cosine distance to the closest training image
                              D: median distance of a training image to the closest other one

    0 is as close as two training images are, or further; 1 is a copy. Give the training images as the autoencoder
    renders them, for a copy is no sharper.

    Raises:
        ValueError: fewer than two training images, which say nothing of how close is close.
    """
    if len(training) < 2:
        raise ValueError("a copy score needs at least two training images")
    among = 1 - training @ training.T
    among.fill_diagonal_(torch.inf)
    usual = among.min(dim=1).values.median().clamp(min=1e-6)  # the same image twice would leave no distance
    closest = 1 - (pictures @ training.T).max(dim=1).values
    return (1 - closest / usual).clamp(0, 1)


def drift(tuned: Tensor, base: Tensor) -> Tensor:
    """How far pictures of the same prompts and seeds have moved from those of the base: cosine distances, (N,)."""
    return (1 - (tuned * base).sum(dim=1)).clamp(min=0)  # rounding aside, it is never below


@dataclass(frozen=True)
class Score:
    """A mean over pictures, and where it would fall 95 % of the time were the pictures drawn anew; a single picture
    cannot tell."""

    mean: float
    low: float | None
    high: float | None
    n: int


def mean_score(values: Tensor) -> Score:
    """The mean of one value for each picture, with a bootstrap interval over the pictures."""
    array = values.double().numpy()
    estimate = Estimate(float(array.mean()), (Influence(array),))
    low, high = bootstrap_interval(estimate) if len(array) > 1 else (None, None)
    return Score(estimate.value, low, high, len(array))
