"""Averages of a model's weights whose length is chosen after training (EDM2: Karras et al. 2023, arXiv:2312.02696,
section 3).

A power-function average at time t gives the weights of time tau a share proportional to (tau / t)^gamma, so that it is
as long, relative to the training, at every moment. What names it is that relative length: its standard deviation as a
share of t, `sigma_rel` in the paper. A few of two lengths, kept now and then, are close to a basis of all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from improved_diffusion.models.ema import EMA


class Profile(NamedTuple):
    """A power-function average: the optimizer steps taken when it was kept, and its relative length."""

    steps: int
    length: float


class PowerFunctionEMA(EMA):
    """Float32 power-function averages of `parameters`, one for each relative length (which `rates` are here)."""

    def decay(self, rate: float, step: int) -> float:
        """(1 - 1/t)^(gamma + 1) at the t-th step (eq. 127): the first forgets the initial weights."""
        return (1 - 1 / (step + 1)) ** (exponent(rate) + 1)


@functools.cache
def exponent(length: float) -> float:
    """gamma of the average of this relative length (algorithm 2): the positive root of the cubic that
    length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) is.

    Raises ValueError unless 0 < length < 12^-0.5, that of the plain mean of all steps.
    """
    if not 0 < length < 12**-0.5:
        raise ValueError(f"the relative length of an average must be between 0 and {12**-0.5:.4f}, not {length}")
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(np.max(roots.real))


def blend(kept: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """The factors, one for each average that was `kept`, of the sum of them that is nearest to the one `wanted`.

    Least squares over the shares that the averages give to each moment (algorithm 3).
    """
    overlaps = np.array([[overlap(a, b) for b in kept] for a in kept])
    return np.linalg.lstsq(overlaps, np.array([overlap(a, wanted) for a in kept]), rcond=1e-12)[0]


def overlap(a: Profile, b: Profile) -> float:
    """The integral over time of the product of what both give to each moment (algorithm 3)."""
    if a.steps > b.steps:
        a, b = b, a
    gamma_a, gamma_b = exponent(a.length), exponent(b.length)
    return (gamma_a + 1) * (gamma_b + 1) * (a.steps / b.steps) ** gamma_b / ((gamma_a + gamma_b + 1) * b.steps)
