"""The Fréchet distance between two Gaussians (Dowson and Landau 1982), by symmetric eigenvalue problems in float64.

Throughout, a factor of a covariance is an A with A A^T = cov. With it no square root of a general matrix is taken,
nothing becomes complex, and singular covariances (fewer samples than dimensions) need no multiple of the identity.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Array = Tensor | np.ndarray

# Eigenvalues of A^T cov A are squares of the singular values that are wanted. Rounding leaves the smallest of these
# fewer digits; below this part of the largest it would be too few, and the singular values are computed themselves.
WELL_CONDITIONED = 1e-12


def frechet_distance(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> float:
    """Squared Fréchet (2-Wasserstein) distance of N(mean1, cov1) and N(mean2, cov2), the distance of FID.

        |mean1 - mean2|^2 + tr(cov1) + tr(cov2) - 2 tr((cov1 cov2)^(1/2))

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
    return distance_by_factor(mean1, factor(cov1), mean2, cov2)


def distance_by_factor(
    mean1: Tensor, factor1: Tensor, mean2: Tensor, cov2: Tensor, factor2: Tensor | None = None
) -> float:
    """`frechet_distance`, of float64 tensors, with the first covariance as its factor, (d, any).

    One reference is compared with many sets, so its factor is worth keeping. `factor2`, where it is at hand (for
    n <= d it is the centred samples), is used in place of cov2.
    """
    traces = factor1.square().sum() + cov2.trace()
    distance = (mean1 - mean2).square().sum() + traces - 2 * _trace_of_root(factor1, cov2, factor2)
    return max(distance.item(), 0.0)  # rounding can take a distance of nothing below zero


def _trace_of_root(factor1: Tensor, cov2: Tensor, factor2: Tensor | None) -> Tensor:
    """tr((cov1 cov2)^(1/2)): the sum of the singular values of A1^T A2, which are the roots of the eigenvalues of
    A1^T cov2 A1."""
    d, rank = factor1.shape
    if factor2 is None and factor1.shape[0] == factor1.shape[1]:
        eigenvalues = torch.linalg.eigvalsh(factor1.T @ (cov2 @ factor1))  # in a third of the singular values' time
        if eigenvalues[0] > WELL_CONDITIONED * eigenvalues[-1]:
            return eigenvalues.sqrt().sum()
    if factor2 is None:
        factor2 = factor(cov2)
    return torch.linalg.svdvals(factor1.T @ factor2).sum()


def factor(cov: Tensor) -> Tensor:
    """(d, rank) A with A A^T = `cov`, symmetric and positive semi-definite up to rounding."""
    noise = len(cov) * torch.finfo(cov.dtype).eps  # relative to the largest eigenvalue
    lower, failed = torch.linalg.cholesky_ex(cov)
    pivots = lower.diagonal().square()
    if not failed and pivots.min() > 100 * noise * pivots.max():
        return lower  # a tenth of the time of the eigenvectors
    eigenvalues, eigenvectors = torch.linalg.eigh(cov)
    # An eigenvalue of zero comes back as noise, and its square root would be no small number.
    kept = eigenvalues > noise * eigenvalues.max()
    return eigenvectors[:, kept] * eigenvalues[kept].sqrt()


class FrechetInfluence:
    """How each sample of the first set moves the distance, to first order (the influence function).

    The derivative of the distance by mean1 is 2 (mean1 - mean2) and by cov1 it is I - T, where T, the optimal transport
    map from the first Gaussian to the second, is A1^-T (A1^T cov2 A1)^(1/2) A1^-1. Resampling the samples moves the
    distance by the mean of the resampled influences.

    Args:
        mean1: float64 (d,). factor1: (d, rank). mean2: (d,). cov2: (d, d).
    """

    def __init__(self, mean1: Tensor, factor1: Tensor, mean2: Tensor, cov2: Tensor):
        self.mean1 = mean1
        self.shift = 2 * (mean1 - mean2)
        eigenvalues, eigenvectors = torch.linalg.eigh(factor1.T @ (cov2 @ factor1))
        root = eigenvectors * eigenvalues.clamp(min=0) ** 0.25  # root root^T = (A1^T cov2 A1)^(1/2)
        self.transport_root = root.T @ _inverse(factor1)  # its square is T

    def __call__(self, samples: Tensor) -> Tensor:
        """Samples (n, d) to influences, float64 (n,), up to a constant."""
        x = samples.to(self.mean1) - self.mean1
        return x @ self.shift + x.square().sum(1) - (x @ self.transport_root.T).square().sum(1)


def _inverse(factor1: Tensor) -> Tensor:
    """(rank, d): the pseudo-inverse. A square factor need not have full rank: n = d centred samples have not."""
    d, columns = factor1.shape
    if columns == d and torch.equal(factor1, factor1.tril()):  # Cholesky's
        return torch.linalg.solve_triangular(factor1, torch.eye(d).to(factor1), upper=False)
    return torch.linalg.pinv(factor1)
