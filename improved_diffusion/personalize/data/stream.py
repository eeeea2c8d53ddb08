"""Which images each step sees: a function of the seed and the step, so that a resumed run sees what it would have."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence

import torch

from improved_diffusion.diffusion.noise import seeded_generator
from improved_diffusion.personalize.config import PersonalizeConfig

ORDER, BATCH_ORDER, PRIOR_ORDER = range(3)


class MicroBatchStream:
    """An endless row of micro-batches, in each of which all images have one size.

    In an epoch every image comes as often as `repeats` says. The images of each size are shuffled and cut into
    micro-batches of `batch_size`, the last of which may be smaller; these are shuffled in turn.

    Args:
        sizes: of each image, anything hashable.
        repeats: times that an epoch holds each image, one number for all or one for each.
        batch_size: images of a micro-batch.
        seed: of the orders.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], repeats: int | Sequence[int], batch_size: int, seed: int):
        self.sizes = tuple(sizes)
        self.repeats = (repeats,) * len(self.sizes) if isinstance(repeats, int) else tuple(repeats)
        self.batch_size = batch_size
        self.seed = seed
        self.images_per_epoch = sum(self.repeats)
        self.batches_per_epoch = len(self._epoch(0))
        self._cached_epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def micro_batch(self, number: int) -> list[int]:
        """Indices of the images of micro-batch `number`, counted from 0 over all epochs."""
        epoch, position = divmod(number, self.batches_per_epoch)
        return self._cached_epoch(epoch)[position]

    def images_in(self, count: int, among: Collection[int] | None = None) -> int:
        """How many images the first `count` micro-batches hold, of all or of those `among` these indices."""
        epochs, rest = divmod(count, self.batches_per_epoch)
        begun = self._cached_epoch(epochs)[:rest]
        if among is None:
            return epochs * self.images_per_epoch + sum(map(len, begun))
        whole = sum(self.repeats[image] for image in among)
        return epochs * whole + sum(image in among for batch in begun for image in batch)

    def _epoch(self, epoch: int) -> list[list[int]]:
        order = torch.randperm(self.images_per_epoch, generator=seeded_generator(self.seed, ORDER, epoch)).tolist()
        rounds = range(max(self.repeats))
        images = [image for number in rounds for image, times in enumerate(self.repeats) if number < times]
        of_size: dict[tuple[int, int], list[int]] = {size: [] for size in self.sizes}
        for position in order:
            of_size[self.sizes[images[position]]].append(images[position])
        batches = [
            images[start : start + self.batch_size]
            for images in of_size.values()
            for start in range(0, len(images), self.batch_size)
        ]
        order = torch.randperm(len(batches), generator=seeded_generator(self.seed, BATCH_ORDER, epoch)).tolist()
        return [batches[position] for position in order]


def stream_of(sizes: Sequence[tuple[int, int]], concepts: Sequence[int], config: PersonalizeConfig) -> MicroBatchStream:
    """That of a run over images of these sizes, each of the concept of that number."""
    repeats = [config.parts[concept].images.repeats for concept in concepts]
    return MicroBatchStream(sizes, repeats, config.training.batch_size, config.seed)


class PriorStream:
    """Which images of the prior are seen beside the others: all once, shuffled, before any comes again."""

    def __init__(self, count: int, seed: int):
        self.count = count
        self._order = functools.lru_cache(maxsize=2)(
            lambda epoch: torch.randperm(count, generator=seeded_generator(seed, PRIOR_ORDER, epoch)).tolist()
        )

    def images(self, first: int, count: int) -> list[int]:
        """Indices of those that are seen from number `first` on, counted over all epochs."""
        positions = range(first, first + count)
        return [self._order(position // self.count)[position % self.count] for position in positions]
