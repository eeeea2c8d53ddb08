"""A run as a set of images to measure: they are generated when they are asked for."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from improved_diffusion.config import SamplingConfig
from improved_diffusion.errors import UserError
from improved_diffusion.metrics.images.sources import Batch, Source
from improved_diffusion.metrics.statistics import FeatureStatistics
from improved_diffusion.sampling.generate import SEEDS, SampleKey
from improved_diffusion.sampling.model import Model

# The source files, and folders of them, that decide what image a checkpoint, settings and a key give.
GENERATING_CODE = (
    *("config.py", "config_file.py", "diffusion", "models", "runtime"),
    *(f"sampling/{name}.py" for name in ("generate", "loading", "model", "model_file", "posthoc")),
)


@functools.cache
def generating_code_hash() -> str:
    """SHA-256 over the text of `GENERATING_CODE` and PyTorch's version: with another sampler, images are others."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256(torch.__version__.encode())
    for name in GENERATING_CODE:
        files = sorted(file for file in (package / name).rglob("*") if file.suffix in (".py", ".c"))
        for file in files or [package / name]:
            digest.update(f"\n{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


class RunSource:
    """Generated images; a source for `improved_diffusion.metrics`.

    Args:
        model: from `load`.
        sampling: how they are drawn.
        keys: which images.
    """

    def __init__(self, model: Model, sampling: SamplingConfig, keys: Sequence[SampleKey]):
        self.name = str(model.checkpoint)
        self.model = model
        self.sampling = sampling
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
        device. What changes no more than rounding is left out: the machine, its threads, whether it has a C compiler
        (see `models/group_norm.py`)."""
        config = self.model.config
        settings = [
            *map(repr, (config.model, config.diffusion, self.sampling, self.model.class_names)),
            *map(str, self.model.image_record(self.sampling).values()),
            self.model.device.type,
        ]
        digest = hashlib.sha256("\n".join(["run", generating_code_hash(), *settings]).encode())
        digest.update(np.array(self.keys, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """See `Source`; drawn in the run's own batches, as big as memory allows."""
        for _, images in self.model.draw(self.keys[start:stop], self.sampling):
            for first in range(0, len(images), batch_size):
                part = images[first : first + batch_size]
                yield Batch(np.arange(start, start + len(part)), part)
                start += len(part)

    def subset(self, rows: np.ndarray) -> RunSource:
        """See `Source`."""
        return RunSource(self.model, self.sampling, [self.keys[row] for row in rows])


def run_source(
    model: Model,
    reference: Source | FeatureStatistics | None,
    sampling: SamplingConfig,
    seed: int = 1,
    per_class: int | None = None,
) -> RunSource:
    """The images of a model to compare with a reference.

    Args:
        model: from `load`.
        reference: images of the model's classes or some of them, of each of which as many are generated; or images or
            statistics without any, whose number is spread evenly. None where it is a model too.
        sampling: how they are drawn.
        seed: of the images; by default another than that of the evaluations by which a run's best was chosen.
        per_class: images of each class, whatever the reference has.

    Raises:
        UserError: a reference that does not say how many images to generate, fewer than two, or a seed out of range.
    """
    if seed not in SEEDS:
        raise UserError(f"the seed of the generated images must be at least 0 and below 2^63, not {seed}")
    classes = len(model.row_names)
    if per_class is None:
        counts = _counts_of(reference, model)
    elif per_class < 1:
        raise UserError(f"--per-class must be at least 1, not {per_class}")
    else:
        counts = [per_class] * classes
    if sum(counts) < 2:
        raise UserError("one image has no covariance: generate at least 2 with --per-class")
    # Class by class within a number, so that a part of the images is balanced too.
    keys = [
        SampleKey(seed, class_index, number)
        for number in range(max(counts))
        for class_index, count in enumerate(counts)
        if number < count
    ]
    return RunSource(model, sampling, keys)


def _counts_of(reference: Source | FeatureStatistics | None, model: Model) -> list[int]:
    """How many images of each class to generate for a comparison with `reference`."""
    if reference is None:
        raise UserError("two runs have no number of images of their own: give one with --per-class")
    classes = len(model.row_names)
    if classes > 1 and not isinstance(reference, FeatureStatistics) and reference.labels is not None:
        names = reference.class_names
        if names is not None and set(names) <= set(model.class_names):
            counts = dict(zip(names, np.bincount(np.asarray(reference.labels), minlength=len(names)), strict=True))
            return [int(counts.get(name, 0)) for name in model.class_names]
        raise UserError(
            f"the classes of {reference.name} are not those of the run {model.source}: say how many images to generate "
            "of each class with --per-class"
        )
    total = reference.n if isinstance(reference, FeatureStatistics) else len(reference)
    if total is None:
        raise UserError(f"{reference.name} does not say of how many images it is: give a number with --per-class")
    return [len(part) for part in np.array_split(np.arange(total), classes)]
