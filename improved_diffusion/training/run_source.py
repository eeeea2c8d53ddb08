"""A run as a set of images to measure: they are generated when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from improved_diffusion.data import ImageSet
from improved_diffusion.errors import UserError
from improved_diffusion.training.generate import LoadedModel, SampleKey, generate, load_model, model_denoiser


class RunSource:
    """Generated images, sampled as the run's own settings say; a source for `improved_diffusion.metrics`.

    Args:
        path: the run directory; its best checkpoint, or else its latest.
        counts: images of each class, in the order of the model's classes.
        device: where to generate.
        seed: of the images.
    """

    def __init__(self, model: LoadedModel, counts: Sequence[int], device: torch.device, seed: int = 0):
        self.name = f"{model.checkpoint} ({model.config.sampling.sampler})"
        self.model = model
        self.device = device
        # Class by class within a number, so that a part of the images is balanced too.
        self.keys = [
            SampleKey(seed, class_index, number)
            for number in range(max(counts, default=0))
            for class_index, count in enumerate(counts)
            if number < count
        ]

    def __len__(self) -> int:
        return len(self.keys)

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """uint8 (n, H, W, 3), in the run's own batch size, which is set by the memory that sampling needs."""
        sampling = self.model.config.sampling
        denoiser = model_denoiser(self.model, sampling, self.device)
        for _, images in generate(denoiser, self.keys, self.model.config, sampling, self.device):
            yield images.cpu().numpy()


def run_source(
    path: Path | str, reference: ImageSet | None, reference_count: int, device: torch.device, per_class: int | None
) -> RunSource:
    """The images of a run to compare with a reference: as many of each class as the reference has, or `per_class`.

    Args:
        path: the run directory.
        reference: the packed set to compare with; None for images without classes, whose number, `reference_count`, is
            then spread evenly over the model's classes.

    Raises:
        UserError: no run, or a reference of other classes than the model's.
    """
    model = load_model(path, device)
    classes = len(model.class_names) if model.config.model.class_conditional else 1
    if per_class is not None:
        return RunSource(model, [per_class] * classes, device)
    if reference is None or classes == 1:
        return RunSource(model, [len(part) for part in np.array_split(np.arange(reference_count), classes)], device)
    if reference.class_names != model.class_names:
        raise UserError(
            f"the classes of {reference.path} are not those of the run {path}: say how many images to generate of each "
            "class with --per-class"
        )
    return RunSource(model, np.bincount(reference.labels, minlength=classes).tolist(), device)
