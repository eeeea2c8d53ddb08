"""The features of a set of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from improved_diffusion.errors import UserError
from improved_diffusion.metrics.inception.extractor import FeatureExtractor, FeatureSettings


@dataclass(frozen=True, eq=False)
class Features:
    """One row for each image that could be read."""

    name: str  # of the image set, for messages
    array: np.ndarray  # float32 (n, d), perhaps memory-mapped
    settings: FeatureSettings
    labels: np.ndarray | None = None  # (n,) class of each row, an index into class_names
    class_names: tuple[str, ...] | None = None
    indices: np.ndarray | None = None  # (n,) number of each row's image in its source; None: that of the row
    skipped: int = 0  # images that could not be read
    content_hash: str | None = None  # of the images; None where they lie nowhere

    @property
    def n(self) -> int:
        """Images."""
        return len(self.array)

    @property
    def d(self) -> int:
        """Features of each."""
        return self.array.shape[1]

    def blocks(self, rows: int = 1024, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """float32 (at most `rows`, d), one after the other."""
        for start in range(0, self.n, rows):
            yield torch.from_numpy(np.array(self.array[start : start + rows])).to(device)

    def image_index(self, row: int) -> int:
        """The number, in its source, of the image of `row`."""
        return int(row if self.indices is None else self.indices[row])

    def take(self, rows: np.ndarray) -> Features:
        """Those of some rows."""
        return Features(
            name=self.name,
            array=np.asarray(self.array[rows]),
            settings=self.settings,
            labels=None if self.labels is None else self.labels[rows],
            class_names=self.class_names,
            indices=rows if self.indices is None else self.indices[rows],
        )


def features_of_batches(
    name: str, batches: Iterable[Tensor | np.ndarray], extractor: FeatureExtractor
) -> dict[int, Features]:
    """Extract features of batches of uint8 images (N, H, W, 3) that come from anywhere, and keep them in memory.

    Returns {feature size: features}. Raises UserError for fewer than two images and for features that are not finite.
    """
    collected: dict[int, list[np.ndarray]] = {size: [] for size in extractor.features}
    for images in batches:
        for size, features in extractor(images).items():
            collected[size].append(finite(features, name))
    if sum(map(len, collected[extractor.features[0]])) < 2:
        raise UserError(f"{name} has fewer than 2 images: nothing can be measured")
    return {size: Features(name, np.concatenate(parts), extractor.settings(size)) for size, parts in collected.items()}


def finite(features: Tensor, name: str) -> np.ndarray:
    """The features as an array, checked.

    Raises:
        UserError: a NaN or an infinity among them.
    """
    broken = int((~torch.isfinite(features)).any(dim=1).sum())
    if broken:
        raise UserError(f"{name}: {broken} of {len(features)} images have features that are NaN or infinite")
    return features.cpu().numpy()
