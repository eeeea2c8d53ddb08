"""What a set of images to measure is: batches of uint8 images, a hash of their content, perhaps classes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from improved_diffusion.data.image_set import CHANNELS
from improved_diffusion.data.sums import array_sha256
from improved_diffusion.errors import UserError


class Batch(NamedTuple):
    """Some images of a source: their numbers (n,), and themselves, uint8 (n, H, W, C), grey, RGB or RGBA."""

    indices: np.ndarray
    images: np.ndarray


class Source(Protocol):
    """Images to measure. Anything like this will do: a model that generates them, for one.

    name            for messages
    content_hash    changes with the images and their order, and with nothing else
    labels          (N,) the class of each image, an index into class_names; or None
    class_names     in the order of the labels; or None
    broken          {number: reason} of the images that `batches` has left out so far, because they cannot be read
    """

    name: str
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    broken: dict[int, str]

    @property
    def content_hash(self) -> str: ...

    def __len__(self) -> int: ...

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """The images from number `start` to before `stop`, in order, about `batch_size` at a time; H and W may change
        from batch to batch."""

    def subset(self, rows: np.ndarray) -> Source:
        """A source of the images of these numbers."""


@dataclass(eq=False)
class ArraySource:
    """Images that are decoded already: uint8 (N, H, W, C), C 1, 3 or 4, in memory or memory-mapped.

    Raises:
        UserError: an array of another dtype or shape, or of fewer than two images.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    broken: dict[int, str] = field(default_factory=dict)
    images_sha256: str | None = None  # of `images`, where it is known

    def __post_init__(self) -> None:
        images = self.images
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in CHANNELS:
            raise UserError(
                f"{self.name} holds {images.dtype} {images.shape}: expected images as uint8 (N, H, W, 3), 0 to 255, or "
                "with 1 or 4 channels"
            )
        check_count(self.name, len(images))

    def __len__(self) -> int:
        return len(self.images)

    @functools.cached_property
    def content_hash(self) -> str:
        """SHA-256 of the shape and the pixels."""
        images_sha256 = self.images_sha256 or array_sha256(self.images)
        return hashlib.sha256(f"array {self.images.shape} {images_sha256}".encode()).hexdigest()

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """See `Source`; at most `batch_size` at a time."""
        stop = len(self.images) if stop is None else stop
        for first in range(start, stop, batch_size):
            last = min(first + batch_size, stop)
            yield Batch(np.arange(first, last), np.array(self.images[first:last]))

    def subset(self, rows: np.ndarray) -> ArraySource:
        """See `Source`; the images are copied into memory."""
        labels = None if self.labels is None else self.labels[rows]
        return ArraySource(self.name, self.images[rows], labels, self.class_names)


def balanced_rows(count: int, labels: np.ndarray | None, n: int, seed: int) -> np.ndarray:
    """The numbers of at most `n` of `count` images, at random and as evenly over the classes as they come; increasing.

    Those of a smaller n are among those of a larger one.
    """
    rng = np.random.default_rng(seed)
    labels = np.zeros(count, dtype=np.int64) if labels is None else labels
    place = np.empty(count, dtype=np.int64)  # of each image within its class
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        place[rng.permutation(of_class)] = np.arange(len(of_class))
    return np.sort(np.lexsort((labels, place))[:n])


def proportional_rows(labels: np.ndarray, shares: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The numbers of at most `n` of the images with these `labels`, at random, in which class c has the share
    `shares[c]`, as nearly as counts can; fewer where a class has not enough images. Increasing."""
    rng = np.random.default_rng(seed)
    available = np.bincount(labels, minlength=len(shares))
    wanted = shares > 0
    n = min(n, int((available[wanted] / shares[wanted]).min()))
    ends = np.round(np.cumsum(shares) * n).astype(int)  # so that the counts add up to n
    counts = np.minimum(np.diff(ends, prepend=0), available)
    parts = [rng.permutation(np.flatnonzero(labels == label))[:count] for label, count in enumerate(counts)]
    return np.sort(np.concatenate(parts))


def check_count(name: str, count: int) -> None:
    """Raise UserError for fewer than two images."""
    if count < 2:
        found = f"{count} image" if count else "no images"
        raise UserError(f"{name} has {found}: at least 2 are needed to measure their statistics")
