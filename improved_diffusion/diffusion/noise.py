"""Explicit randomness: generators that are functions of what they are for, never of what was drawn before."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def _sequence(key: Sequence[int]) -> np.random.SeedSequence:
    # As an entropy, (1, 2) and (1, 2, 0) would be padded to the same; as a spawn key they differ.
    return np.random.SeedSequence(key[0], spawn_key=tuple(key[1:]))


def seeded_generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that is a function of `key`, for instance (seed, step). Those of different keys are independent, as
    far as torch tells them apart: by 32 bits on a CPU."""
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


class PhiloxNoise:
    """`PerSampleNoise` by a counter-based generator in PyTorch's operations, so that it is drawn where it is wanted.

    Normal number 4 i + j of draw d of the sample (seed, class, number) is a function of the j-th word of
    Philox4x32-10(counter = (i, d, number, class), key = seed): no two numbers share a word. The words are the same on
    every device; the normals are computed in float64 and rounded, so that they differ at most where a rounding falls
    on the other side.

    Arguments as for `PerSampleNoise`.

    Raises:
        ValueError: a seed of 2^64 or more, or a class or number of 2^32 or more.
    """

    def __init__(self, keys: Sequence[tuple[int, int, int]], shape: tuple[int, ...], device: torch.device | str):
        for seed, label, number in keys:
            if not (0 <= seed < 2**64 and 0 <= label <= WORD and 0 <= number <= WORD):
                raise ValueError(f"seed {seed}, class {label} or number {number} is too large for Philox noise")
        words = [[seed & WORD, seed >> 32, label, number] for seed, label, number in keys]
        self.words = torch.tensor(words, dtype=torch.int64).to(device)  # (N, 4)
        self.shape = shape
        self.draws = 0

    def __call__(self) -> Tensor:
        """The next noise of every sample, float32 (N, C, H, W)."""
        n, size = len(self.words), math.prod(self.shape)
        low, high, label, number = self.words[:, :, None].unbind(1)  # each (N, 1)
        position = torch.arange(-(-size // 4), device=self.words.device)
        draw = torch.full_like(label, self.draws)
        self.draws += 1
        words = philox4x32((position, draw, number, label), (low, high))
        return torch.stack(box_muller(*words), dim=-1).flatten(1)[:, :size].float().reshape(n, *self.shape)


WORD = 0xFFFFFFFF  # a word of 32 bits, which an int64 holds without a sign
Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor], rounds: int = 10) -> Words:
    """Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3): four random words,
    a function of the counter's four and the key's two. All int64, 0..2^32 - 1, of shapes that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The product of two words fills all 64 bits: as an int64 it may be negative, but its bits are right.
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (product2 >> 32 & WORD) ^ c1 ^ k0,
            product2 & WORD,
            (product0 >> 32 & WORD) ^ c3 ^ k1,
            product0 & WORD,
        )
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return c0, c1, c2, c3


def box_muller(*words: Tensor) -> list[Tensor]:
    """As many standard normals, float64, as random `words`, which are taken in pairs (Box & Muller 1958)."""
    normals = []
    for first, second in zip(words[::2], words[1::2], strict=True):
        radius = torch.sqrt(-2 * torch.log((first.double() + 0.5) / 2**32))
        angle = (second.double() + 0.5) * (2 * math.pi / 2**32)
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return normals


NOISES: dict[str, Callable[..., PerSampleNoise | PhiloxNoise]] = {"numpy": PerSampleNoise, "philox": PhiloxNoise}
