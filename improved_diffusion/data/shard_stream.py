"""Training batches from a sharded set: a function of seed and step, in memory of a few shards."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from improved_diffusion.data.batches import (
    PREFETCHED_BATCHES,
    drawn_order,
    epoch_order,
    to_host,
    to_network,
    with_index,
)
from improved_diffusion.data.shards import ShardedSet

Rows = tuple[np.ndarray, ...]  # images (n, H, W, C) uint8, labels (n,) int64, whether each is flipped (n,) bool


class ShardStream:
    """Endless shuffled batches of a sharded set, one share of each for every rank.

    In every epoch the shards have a fresh order, drawn from (seed, epoch), and the images of a shard a fresh order and
    fresh flips, drawn from (seed, epoch, shard). All epochs' shards, one after the other, are dealt out to `lanes`:
    lane l gets those with the numbers l, l + lanes, ... A lane reads its shards one at a time, and fills the same
    places of every batch, as many as the others do or one more. So a batch is the same for every `world_size`, a
    process reads only the lanes of its share, and a resumed run draws what an unbroken one would, once it has read a
    shard for each.
    """

    def __init__(
        self,
        sharded_set: ShardedSet,
        batch_size: int,  # images per step, over all ranks; a multiple of world_size
        seed: int,
        *,
        flip: bool,  # mirror each image left-right with probability 1/2, anew every epoch
        lanes: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sharded_set = sharded_set
        self.seed = seed
        self.flip = flip
        self.device = with_index(torch.device(device))
        self.lanes = min(lanes, batch_size, len(sharded_set.shards))
        bounds = [batch_size * lane // self.lanes for lane in range(self.lanes + 1)]
        self.places = [range(*pair) for pair in itertools.pairwise(bounds)]  # of each lane in a batch
        share = batch_size // world_size
        self.share = range(rank * share, (rank + 1) * share)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's share of the batch of step 0, 1, 2, ..., as `BatchStream.batch` gives it."""
        return next(self.batches(step))

    def batches(self, first_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`batch(first_step)`, `batch(first_step + 1)`, and so on without end, read ahead in threads.

        Raises:
            UserError: a shard cannot be read.
        """
        with ThreadPoolExecutor(self.lanes) as readers, ThreadPoolExecutor(1) as assembler:
            parts = []
            for lane, places in enumerate(self.places):
                mine = range(max(places.start, self.share.start), min(places.stop, self.share.stop))
                if mine:
                    loaded = self._loaded(readers, lane, first_step * len(places))
                    parts.append(
                        _dealt(loaded, len(places), slice(mine.start - places.start, mine.stop - places.start))
                    )

            def assemble() -> tuple[Tensor, ...]:
                rows = zip(*map(next, parts), strict=True)
                return to_host(tuple(np.concatenate(arrays) for arrays in rows), self.device)

            pending = deque(assembler.submit(assemble) for _ in range(PREFETCHED_BATCHES))
            while True:
                prepared = pending.popleft().result()
                pending.append(assembler.submit(assemble))
                images, labels, flips = (tensor.to(self.device, non_blocking=True) for tensor in prepared)
                yield to_network(images, flips if self.flip else None), labels

    def _loaded(self, readers: ThreadPoolExecutor, lane: int, skipped: int) -> Iterator[Rows]:
        """The shards of a lane, shuffled, without the first `skipped` images; each is read while the one before it is
        in use."""
        turns = self._turns(lane)
        first = next(turns)
        while skipped >= (count := self.sharded_set.shards[first[1]].count):
            skipped -= count
            first = next(turns)
        pending = readers.submit(self._load, *first)
        while True:
            rows = tuple(array[skipped:] for array in pending.result())
            skipped = 0
            pending = readers.submit(self._load, *next(turns))
            yield rows

    def _turns(self, lane: int) -> Iterator[tuple[int, int]]:
        """Epoch and number of each shard of a lane."""
        count = len(self.sharded_set.shards)
        for turn in itertools.count(lane, self.lanes):
            epoch, place = divmod(turn, count)
            yield epoch, int(epoch_order(self.seed, epoch, count)[0][place])

    def _load(self, epoch: int, number: int) -> Rows:
        images, labels = self.sharded_set.read(number)
        order, flips = drawn_order((self.seed, epoch, number + 1), len(labels))  # 0 would be as none
        return images[order], labels[order], flips


def _dealt(loaded: Iterator[Rows], count: int, wanted: slice) -> Iterator[Rows]:
    """Of each `count` images that come next those that are `wanted`."""
    rows = next(loaded)
    while True:
        while len(rows[0]) < count:
            rows = tuple(map(np.concatenate, zip(rows, next(loaded), strict=True)))
        yield tuple(array[wanted] for array in rows)
        rows = tuple(array[count:] for array in rows)
