"""The picture of a folder of samples: a row for each class, a square of one class alone; and real images beside them if
wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from improved_diffusion.data.image_set import ImageSet, open_image_set
from improved_diffusion.errors import UserError
from improved_diffusion.sampling.generate import SampleKey
from improved_diffusion.sampling.grids import make_grid
from improved_diffusion.sampling.model import Model
from improved_diffusion.sampling.sample_folder import read_sample, sample_file

COLUMNS = 16
SHORT = 4  # images that one class alone has in a row
SIDE = 8192  # pixels: what viewers still open


class Overview:
    """The first images of each class in `keys`, of as many classes as make a picture that one can look at.

    Args:
        model: what draws them.
        keys: as `Model.keys` makes them: equally many of each class, class by class.
        beside: a packed set, of whose classes of the same names images are shown to the right.

    Raises:
        UserError: `beside` is no packed set, has images of another size (they are not resized, since that blurs and
            would flatter the model), or none of a class that is shown.
    """

    def __init__(self, model: Model, keys: Sequence[SampleKey], beside: Path | None = None):
        self.model = model
        _, height, width = model.config.model.image_shape
        classes = sorted({key.class_index for key in keys})
        self.n, self.classes = len(keys) // len(classes), len(classes)
        self.columns = max(1, min(self.n, COLUMNS, SIDE // width))
        rows: dict[int, list[SampleKey]] = {label: [] for label in classes[: max(1, SIDE // height)]}
        for key in keys:
            if key.class_index in rows and len(rows[key.class_index]) < self.columns:
                rows[key.class_index].append(key)
        self.rows = list(rows.values())
        self.real = None if beside is None else self._real_rows(open_image_set(beside))

    @property
    def caption(self) -> str:
        """What of the samples it shows."""
        images = f"{_part(self.columns, self.n)} images"
        return images if self.classes == 1 else f"{images} a class, {_part(len(self.rows), self.classes)} classes"

    def draw(self, folder: Path) -> np.ndarray:
        """uint8 (height, width, 3), from the images in `folder`.

        Raises:
            UserError: one of them is not there any more.
        """
        images = np.array([[self._read(folder, key) for key in row] for row in self.rows])
        titles = tuple(self.model.row_names[row[0].class_index] for row in self.rows)
        folded = _folded(images)
        grid = make_grid(folded, titles + ("",) * (len(folded) - len(titles)))
        if self.real is None:
            return grid
        gap = np.full((len(grid), images.shape[3] // 2, 3), 255, np.uint8)
        return np.concatenate([grid, gap, make_grid(_folded(self.real))], axis=1)

    def _read(self, folder: Path, key: SampleKey) -> np.ndarray:
        file = folder / sample_file(key.seed, self.model.row_names[key.class_index], key.number)
        image = read_sample(file, self.model.config.model.image_shape)
        if image is None:
            raise UserError(f"{file} disappeared or was damaged: run the same command again")
        return image

    def _real_rows(self, images: ImageSet) -> np.ndarray:
        """uint8 (rows, columns, H, W, C), white where a class has fewer images than there are columns."""
        _, height, width = self.model.config.model.image_shape
        found_height, found_width, channels = images.images.shape[1:]
        if (found_height, found_width) != (height, width):
            raise UserError(
                f"--beside {images.path} has images of {found_height}x{found_width} pixels, and the model draws "
                f"{height}x{width}: pack them at that size with `python -m improved_diffusion.data`"
            )
        real = np.full((len(self.rows), self.columns, height, width, channels), 255, np.uint8)
        for row, keys in enumerate(self.rows):
            chosen = self._numbers_of(images, keys[0].class_index)[: self.columns]
            real[row, : len(chosen)] = images.images[chosen]
        return real

    def _numbers_of(self, images: ImageSet, label: int) -> np.ndarray:
        """Which images of the set are of that class of the model; spread over all, of a model without classes."""
        if not self.model.config.model.class_conditional:
            count = min(self.columns, len(images.images))
            return np.linspace(0, len(images.images) - 1, count).round().astype(int)
        name = self.model.class_names[label]
        found = images.class_names.index(name) if name in images.class_names else -1
        numbers = np.flatnonzero(images.labels == found)
        if not len(numbers):
            raise UserError(f"--beside {images.path} has no image of the class {name!r}, which the model draws")
        return numbers


def _folded(rows: np.ndarray) -> np.ndarray:
    """uint8 (R, columns, ...): of one long row a square, white where no image is left; several rows as they are."""
    if len(rows) > 1 or rows.shape[1] <= SHORT:
        return rows
    side = math.ceil(math.sqrt(rows.shape[1]))
    square = np.full((math.ceil(rows.shape[1] / side) * side, *rows.shape[2:]), 255, np.uint8)
    square[: rows.shape[1]] = rows[0]
    return square.reshape(-1, side, *rows.shape[2:])


def _part(shown: int, total: int) -> str:
    return f"{total:,}" if shown == total else f"{shown:,} of {total:,}"
