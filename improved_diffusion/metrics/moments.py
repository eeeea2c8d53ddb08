"""Mean and covariance of features that arrive in batches, in float64 and in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Running mean and scatter matrix, combined by the pairwise update of Chan, Golub and LeVeque (1979).

    Features are centred on the mean of their own batch before they are squared, so a large common offset costs no
    digits. The result depends on how the features were split only by rounding.

    Attributes:
        n: number of features so far.
        mean: float64 (d,).
        scatter: float64 (d, d), the sum of (x - mean)(x - mean)^T.
    """

    def __init__(self, d: int, device: torch.device | str = "cpu"):
        self.n = 0
        self.mean = torch.zeros(d, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(d, d, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add `features` (N, d), of any float dtype.

        Raises:
            ValueError: not (N, d).
            FloatingPointError: a NaN or an infinity among them.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features must have shape (N, {len(self.mean)}), got {tuple(features.shape)}")
        if len(features) == 0:
            return
        if not torch.isfinite(features).all():
            broken = int((~torch.isfinite(features)).any(dim=1).sum())
            raise FloatingPointError(f"{broken} of {len(features)} feature vectors hold a NaN or an infinity")
        features = features.to(self.mean)
        mean = features.mean(dim=0)
        centred = features - mean
        self._combine(len(features), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Add all the features that `other` has seen."""
        if other.n:
            self._combine(other.n, other.mean.to(self.mean), other.scatter.to(self.scatter))

    def _combine(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.n + n
        shift = mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(shift, shift, alpha=self.n * n / total)
        self.mean += shift * (n / total)
        self.n = total

    def covariance(self) -> Tensor:
        """float64 (d, d), unbiased: the divisor is n - 1.

        Raises:
            ValueError: fewer than two features.
        """
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 features, got {self.n}")
        return self.scatter / (self.n - 1)
