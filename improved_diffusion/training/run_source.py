"""A run as a set of images to measure: they are generated when they are asked for."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from improved_diffusion.data.image_set import is_image_set
from improved_diffusion.errors import UserError
from improved_diffusion.metrics.images.opening import open_source
from improved_diffusion.metrics.images.sources import Batch, Source
from improved_diffusion.metrics.statistics import FeatureStatistics, is_statistics_file
from improved_diffusion.run_directory import is_run_directory
from improved_diffusion.training.generate import (
    LoadedModel,
    SampleKey,
    generate,
    image_record,
    load_model,
    model_denoiser,
)

# The source files, and folders of them, that decide what image a checkpoint, settings and a key give.
GENERATING_CODE = (
    *("config.py", "diffusion", "models"),
    *("training/devices.py", "training/generate.py", "training/model.py"),
)


@functools.cache
def generating_code_hash() -> str:
    """SHA-256 over the text of `GENERATING_CODE` and PyTorch's version: with another sampler, images are others."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256(torch.__version__.encode())
    for name in GENERATING_CODE:
        for file in sorted((package / name).rglob("*.py")) or [package / name]:
            digest.update(f"\n{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class RunImages:
    """Which images of a run are measured."""

    per_class: int | None = None
    """How many of each class; by default as many as what they are compared with has."""
    checkpoint: str | None = None
    """As for `load_model`."""
    ema: float | None = None
    """As for `load_model`."""
    seed: int = 1
    """Of the generated images; by default another than that of the evaluations by which the best was chosen."""


class RunSource:
    """Generated images, sampled as the run's own settings say; a source for `improved_diffusion.metrics`.

    Args:
        model: from `load_model`.
        keys: which images.
        device: where to generate.
    """

    def __init__(self, model: LoadedModel, keys: Sequence[SampleKey], device: torch.device):
        self.name = str(model.checkpoint)
        self.model = model
        self.device = device
        self.keys = list(keys)

        has_classes = model.config.model.class_conditional
        self.labels = np.array([key.class_index for key in self.keys]) if has_classes else None
        self.class_names = model.class_names if has_classes else None
        self.broken: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.keys)

    @functools.cached_property
    def content_hash(self) -> str:
        """SHA-256 over all that decides the images: the checkpoint, the settings, the code, which images, the kind of
        device."""
        config = self.model.config
        settings = [
            *map(repr, (config.model, config.diffusion, config.sampling, self.model.class_names)),
            *map(str, image_record(self.model, config.sampling).values()),
            self.device.type,
        ]
        digest = hashlib.sha256("\n".join(["run", generating_code_hash(), *settings]).encode())
        digest.update(np.array(self.keys, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """See `Source`; drawn in the run's own batches, as big as memory allows."""
        sampling = self.model.config.sampling
        denoiser = model_denoiser(self.model, sampling, self.device)
        for _, images in generate(denoiser, self.keys[start:stop], self.model.config, sampling, self.device):
            for part in images.split(batch_size):
                yield Batch(np.arange(start, start + len(part)), part.cpu().numpy())
                start += len(part)

    def subset(self, rows: np.ndarray) -> RunSource:
        """See `Source`."""
        return RunSource(self.model, [self.keys[row] for row in rows], self.device)


def run_source(path: Path, reference: Path, device: torch.device | str, which: RunImages) -> RunSource:
    """The images of a run to compare with a reference.

    Args:
        path: the run directory.
        reference: images of the model's classes, of each of which as many are generated; or images or statistics
            without them, whose number is spread evenly.
        device: where to generate.
        which: of its images.

    Raises:
        UserError: no run, or a reference of other classes than the model's.
    """
    device = torch.device(device)
    model = load_model(path, device, which.checkpoint, which.ema)
    classes = len(model.class_names) if model.config.model.class_conditional else 1
    if which.per_class is None:
        counts = _counts_of(reference, path, model, classes)
    elif which.per_class < 1:
        raise UserError(f"--per-class must be at least 1, not {which.per_class}")
    else:
        counts = [which.per_class] * classes
    if sum(counts) < 2:
        raise UserError("one image has no covariance: generate at least 2 with --per-class")
    # Class by class within a number, so that a part of the images is balanced too.
    keys = [
        SampleKey(which.seed, class_index, number)
        for number in range(max(counts))
        for class_index, count in enumerate(counts)
        if number < count
    ]
    return RunSource(model, keys, device)


def _counts_of(reference: Path, path: Path, model: LoadedModel, classes: int) -> list[int]:
    """How many images of each class to generate for a comparison with `reference`."""
    images = _images_or_statistics(reference)
    names = getattr(images, "class_names", None)
    if classes > 1 and names == model.class_names:
        return np.bincount(images.labels, minlength=classes).tolist()
    if classes > 1 and is_image_set(reference):
        raise UserError(
            f"the classes of {reference} are not those of the run {path}: say how many images to generate of each "
            "class with --per-class"
        )
    total = images.n if isinstance(images, FeatureStatistics) else len(images)
    if total is None:
        raise UserError(f"{reference} does not say of how many images it is: give a number with --per-class")
    return [len(part) for part in np.array_split(np.arange(total), classes)]


def open_side(path: Path, other: Path, device: torch.device | str, which: RunImages) -> FeatureStatistics | Source:
    """What lies at `path`, to be compared with `other`: images, saved statistics, or a run, which generates images.

    Raises:
        UserError: nothing usable, or two runs without a number of images per class.
    """
    if not is_run_directory(path):
        return _images_or_statistics(path)
    if is_run_directory(other) and which.per_class is None:
        raise UserError("two runs have no number of images of their own: give one with --per-class")
    return run_source(path, other, device, which)


def _images_or_statistics(path: Path) -> FeatureStatistics | Source:
    return FeatureStatistics.load(path) if is_statistics_file(path) else open_source(path)
