"""The Inception Score (Salimans et al. 2016, arXiv:1606.03498)."""

from __future__ import annotations

import numpy as np
import torch

from improved_diffusion.metrics.estimate import Estimate, Influence
from improved_diffusion.metrics.features import Features

SPLITS = 10


def inception_score(logits: Features, seed: int = 0) -> Estimate:
    """exp of the mean over images of KL(p(y|x) || p(y)), of the classifier's 1008 logits.

    The value is that of all images at once. `split_mean` and `split_std` are those of ten random splits, the
    literature's convention; a split of n/10 images scores lower.
    """
    probabilities = torch.cat([block.double().softmax(dim=1) for block in logits.blocks()])
    value, divergences = _score(probabilities)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(logits.n))  # sets lie class by class
    splits = [_score(part)[0] for part in probabilities[order].tensor_split(SPLITS) if len(part)]
    return Estimate(
        value=value,
        influences=(Influence(value * divergences, logits.labels),),  # p(y) moves the score in second order only
        details={
            "split_mean": float(np.mean(splits)),
            "split_std": float(np.std(splits)),
            "splits": len(splits),
        },
    )


def _score(probabilities: torch.Tensor) -> tuple[float, np.ndarray]:
    """The score, and each image's divergence."""
    marginal = probabilities.mean(dim=0, keepdim=True)
    terms = torch.special.xlogy(probabilities, probabilities) - torch.special.xlogy(probabilities, marginal)
    divergences = terms.sum(dim=1)
    return divergences.mean().exp().item(), divergences.numpy()
