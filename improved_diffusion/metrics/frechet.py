"""The Fréchet distance between two Gaussians (Dowson and Landau 1982), by symmetric eigenvalue problems in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Array = Tensor | np.ndarray


def frechet_distance(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> float:
    """Squared Fréchet (2-Wasserstein) distance of N(mean1, cov1) and N(mean2, cov2), the distance of FID.

        |mean1 - mean2|^2 + tr(cov1) + tr(cov2) - 2 tr((cov1 cov2)^(1/2))

    With cov = A A^T, the last trace is the sum of the singular values of A1^T A2. So no square root of a general matrix
    is taken, nothing becomes complex, and singular covariances (fewer samples than dimensions) need no small multiple
    of the identity: directions without variance are left out of A.

    Args:
        mean1, mean2: (d,).
        cov1, cov2: (d, d), symmetric and positive semi-definite.

    Raises:
        ValueError: shapes that do not match, or a NaN or an infinity.
    """
    arrays = [torch.as_tensor(array, dtype=torch.float64, device="cpu") for array in (mean1, cov1, mean2, cov2)]
    mean1, cov1, mean2, cov2 = arrays
    d = mean1.numel()
    if mean1.shape != (d,) or mean2.shape != (d,) or cov1.shape != (d, d) or cov2.shape != (d, d):
        shapes = ", ".join(str(tuple(array.shape)) for array in arrays)
        raise ValueError(f"means (d,) and covariances (d, d) of one size are needed, got {shapes}")
    if not all(torch.isfinite(array).all() for array in arrays):
        raise ValueError("the means and covariances hold a NaN or an infinity")
    cross = torch.linalg.svdvals(factor(cov1).T @ factor(cov2)).sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(distance.item(), 0.0)  # rounding can take a distance of nothing below zero


def factor(cov: Tensor) -> Tensor:
    """(d, rank) A with A A^T = `cov`, symmetric and positive semi-definite up to rounding."""
    eigenvalues, eigenvectors = torch.linalg.eigh(cov)
    # An eigenvalue of zero comes back as noise of this size, and its square root would be no small number.
    noise = len(cov) * torch.finfo(cov.dtype).eps * eigenvalues.max()
    kept = eigenvalues > noise
    return eigenvectors[:, kept] * eigenvalues[kept].sqrt()
