"""Kernel Inception distance (Bińkowski et al. 2018, arXiv:1801.01401)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from improved_diffusion.metrics.estimate import Estimate, Influence
from improved_diffusion.metrics.features import Features

SUBSETS = 100
SUBSET_SIZE = 1000
BLOCK = 4096  # rows and columns of a block of the kernel matrix


def kernel_inception_distance(
    real: Features, fake: Features, device: torch.device | str = "cpu", seed: int = 0
) -> Estimate:
    """The squared maximum mean discrepancy under the kernel (x . y / d + 1)^3, unbiased: for two samples of one
    distribution it lies about 0, on either side.

    The value uses every pair of images. `subset_mean` and `subset_std` are those of 100 random subsets of 1,000 images,
    as the literature reports them; the deviation is of one subset's value, not of their mean.
    """
    within_real = (_row_sums(real, real, device) - _self_kernel(real)) / (real.n - 1)
    within_fake = (_row_sums(fake, fake, device) - _self_kernel(fake)) / (fake.n - 1)
    across_real = _row_sums(real, fake, device) / fake.n
    across_fake = _row_sums(fake, real, device) / real.n
    details = {}
    if max(real.n, fake.n) > SUBSET_SIZE:  # else all subsets are the set
        subset_size = min(SUBSET_SIZE, real.n, fake.n)
        subsets = _subset_values(real, fake, subset_size, device, seed)
        details = {
            "subset_mean": float(subsets.mean()),
            "subset_std": float(subsets.std()),
            "subset_size": subset_size,
            "subsets": SUBSETS,
        }
    return Estimate(
        value=float(within_real.mean() + within_fake.mean() - 2 * across_real.mean()),
        influences=(
            Influence(2 * (within_real - across_real), real.labels),
            Influence(2 * (within_fake - across_fake), fake.labels),
        ),
        details=details,
    )


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(N, d) and (M, d) to (N, M): (x . y / d + 1)^3."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def unbiased_mmd2(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy of two samples, (N, d) and (M, d)."""
    n, m = len(x), len(y)
    xx, yy, xy = (polynomial_kernel(a, b).double() for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return (within - 2 * xy.mean()).item()


def _subset_values(real: Features, fake: Features, size: int, device: torch.device | str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(SUBSETS):
        x, y = (
            torch.from_numpy(side.array[np.sort(rng.choice(side.n, size, replace=False))]).to(device)
            for side in (real, fake)
        )
        values.append(unbiased_mmd2(x, y))
    return np.array(values)


def _row_sums(left: Features, right: Features, device: torch.device | str) -> np.ndarray:
    """float64 (left.n,): of each left image, the sum of its kernel with all right ones."""
    sums = [
        sum(polynomial_kernel(x, y).sum(dim=1, dtype=torch.float64) for y in right.blocks(BLOCK, device))
        for x in left.blocks(BLOCK, device)
    ]
    return torch.cat(sums).cpu().numpy()


def _self_kernel(features: Features) -> np.ndarray:
    """float64 (n,): the kernel of each image with itself."""
    blocks = [(x.double().square().sum(1) / features.d + 1) ** 3 for x in features.blocks(BLOCK)]
    return torch.cat(blocks).numpy()
