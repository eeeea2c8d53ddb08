"""Training batches from an image set: a pure function of seed and step, without waiting for data."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from improved_diffusion.data.image_set import ImageSet
from improved_diffusion.errors import UserError

PREFETCHED_BATCHES = 4
RESIDENT_FRACTION = 0.5  # of the free device memory: the rest is the network's and its activations'
UPLOAD_BYTES = 1 << 28


class BatchStream:
    """Endless shuffled batches of an image set, one share of each for every rank.

    Sample number p = step * batch_size + j of a run is image `order[p % N]` of epoch p // N, where every epoch has a
    fresh permutation `order`, and fresh flips, drawn from (seed, epoch). Batches run on over the end of an epoch. Rank
    r takes the r-th of `world_size` equal slices of each batch, so the batch of a step is the same for every
    `world_size`, and a resumed run draws what an unbroken one would.

    On CUDA a set that takes less than half of the free memory is kept there whole. Otherwise batches come from the
    memory map, and `batches` prepares them ahead in threads.
    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,  # images per step, over all ranks
        seed: int,
        *,
        flip: bool,  # mirror each image left-right with probability 1/2, anew every epoch
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Raises `UserError` when `batch_size` is not a positive multiple of `world_size`."""
        if batch_size < 1 or batch_size % world_size:
            raise UserError(f"the batch size, {batch_size}, must be a positive multiple of the {world_size} processes")
        self.image_set = image_set
        self.batch_size = batch_size
        self.seed = seed
        self.flip = flip
        self.device = with_index(torch.device(device))
        self.rank = rank
        self.world_size = world_size
        self._resident = _upload(image_set.images, self.device) if _fits(image_set.images, self.device) else None

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's share of the batch of step 0, 1, 2, ...

        Returns, on the device, x: float32 (batch_size / world_size, C, H, W) in [-1, 1], channels-last in memory; and
        y: int64 (batch_size / world_size,).
        """
        return self._on_device(*self._on_host(step))

    def batches(self, first_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`batch(first_step)`, `batch(first_step + 1)`, and so on without end."""
        steps = itertools.count(first_step)
        if self._resident is not None:
            yield from map(self.batch, steps)  # never ends
        with ThreadPoolExecutor(PREFETCHED_BATCHES) as pool:
            pending = deque(pool.submit(self._on_host, next(steps)) for _ in range(PREFETCHED_BATCHES))
            while True:
                prepared = pending.popleft().result()
                pending.append(pool.submit(self._on_host, next(steps)))
                yield self._on_device(*prepared)

    def _on_host(self, step: int) -> tuple[Tensor, ...]:
        """What has to be copied to the device: images (n, H, W, C) uint8, or their rows (n,) int64 where the set is
        resident; labels (n,) int64; and whether to flip (n,) bool. Runs in threads, and starts no work on the device.
        """
        rows, flips = self._rows(step)
        images = rows if self._resident is not None else self.image_set.images[rows]
        return to_host((images, self.image_set.labels[rows], flips), self.device)

    def _on_device(self, images: Tensor, labels: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        images, labels, flips = (tensor.to(self.device, non_blocking=True) for tensor in (images, labels, flips))
        if self._resident is not None:
            images = self._resident[images]
        return to_network(images, flips if self.flip else None), labels

    def _rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the image set in this rank's share of a batch, int64, and whether each is flipped, bool."""
        share = self.batch_size // self.world_size
        positions = step * self.batch_size + self.rank * share + np.arange(share)
        epochs, within = np.divmod(positions, len(self.image_set.images))
        rows, flips = np.empty(share, dtype=np.int64), np.empty(share, dtype=bool)
        for epoch in np.unique(epochs).tolist():
            order, flipped = epoch_order(self.seed, epoch, len(self.image_set.images))
            here = epochs == epoch
            rows[here], flips[here] = order[within[here]], flipped[within[here]]
        return rows, flips


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The permutation of the `count` rows in an epoch, int64, and for each place in it whether it is flipped, bool."""
    return drawn_order((seed, epoch), count)


def drawn_order(keys: tuple[int, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    """A permutation of `count` rows, int64, and for each place in it whether it is flipped, bool; drawn from `keys`."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(keys)))
    return rng.permutation(count), rng.integers(0, 2, count, dtype=bool)


def to_host(arrays: tuple[np.ndarray, ...], device: torch.device) -> tuple[Tensor, ...]:
    """The arrays as tensors that are fast to copy to the device. Starts no work there, so that threads may call it."""
    tensors = tuple(map(torch.from_numpy, arrays))
    if device.type != "cuda":
        return tensors
    with torch.cuda.device(device):  # pinned, so that the copy need not wait for the kernels before it
        return tuple(tensor.pin_memory() for tensor in tensors)


def to_network(images: Tensor, flips: Tensor | None) -> Tensor:
    """Images (n, H, W, C) uint8, those of `flips` (n,) mirrored, as float32 (n, C, H, W) in [-1, 1], channels-last."""
    images = images.permute(0, 3, 1, 2)
    if flips is not None:
        images = torch.where(flips[:, None, None, None], images.flip(3), images)
    return images.float().div_(127.5).sub_(1)


def with_index(device: torch.device) -> torch.device:
    """Name the CUDA device that "cuda" means now and here: in another thread it may mean another."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _fits(images: np.ndarray, device: torch.device) -> bool:
    """Whether the whole array can stay on the device. The memory map is already where the CPU wants it."""
    return device.type == "cuda" and images.nbytes < RESIDENT_FRACTION * torch.cuda.mem_get_info(device)[0]


def _upload(images: np.ndarray, device: torch.device) -> Tensor:
    """Copy in pieces, so that the array is never whole in host memory."""
    resident = torch.empty(images.shape, dtype=torch.uint8, device=device)
    rows = max(1, UPLOAD_BYTES // images[:1].nbytes)
    for start in range(0, len(images), rows):
        resident[start : start + rows] = torch.from_numpy(np.array(images[start : start + rows]))
    return resident
