"""Explicit randomness: generators that are functions of what they are for, never of what was drawn before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def _sequence(key: Sequence[int]) -> np.random.SeedSequence:
    # As an entropy, (1, 2) and (1, 2, 0) would be padded to the same; as a spawn key they differ.
    return np.random.SeedSequence(key[0], spawn_key=tuple(key[1:]))


def seeded_generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that is a function of `key`, for instance (seed, step); different keys are independent."""
    return torch.Generator(device).manual_seed(int(_sequence(key).generate_state(1, np.uint64)[0]))


class PerSampleNoise:
    """Noise for a batch in which every sample has a generator of its own, keyed by (seed, class, number).

    So an image does not depend on which others are in its batch. numpy draws the numbers: a seed means the same noise
    on every device, and all 128 bits of the key's state count (torch's CPU generator takes 32, and among the images of
    one seed two would now and then share all their noise).

    Args:
        keys: (seed, class, number) of each sample.
        shape: of one sample, (C, H, W).
        device: where the noise is wanted.
    """

    def __init__(self, keys: Sequence[tuple[int, int, int]], shape: tuple[int, ...], device: torch.device | str):
        self.generators = [np.random.default_rng(_sequence(key)) for key in keys]
        self.shape = shape
        self.device = device

    def __call__(self) -> Tensor:
        """The next noise of every sample, float32 (N, C, H, W)."""
        noise = np.stack([g.standard_normal(self.shape, dtype=np.float32) for g in self.generators])
        return torch.from_numpy(noise).to(self.device)
