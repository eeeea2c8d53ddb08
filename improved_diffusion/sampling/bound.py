"""The variational bound of a trained model on images that it has not seen."""

from __future__ import annotations

import numpy as np
import torch

from improved_diffusion.config import Config, SamplingConfig
from improved_diffusion.data.image_set import ImageSet
from improved_diffusion.diffusion.bound import VariationalBound, variational_bound
from improved_diffusion.diffusion.noise import PerSampleNoise
from improved_diffusion.errors import UserError
from improved_diffusion.models.build import build_schedule
from improved_diffusion.progress import progress
from improved_diffusion.sampling.model import Model


def has_bound(config: Config) -> bool:
    """Whether a model that was trained so has a bound to speak of: steps, and a variance that is fixed or trained."""
    trained = config.loss != "mse" or config.diffusion.variance != "learned_range"
    return config.diffusion.timesteps is not None and trained


def bound_rows(image_set: ImageSet, n: int) -> np.ndarray:
    """Numbers of `n` images, spread evenly over the set.

    Raises:
        UserError: the set has fewer.
    """
    count = len(image_set.images)
    if not 1 <= n <= count:
        raise UserError(f"the bound can be of 1 to all {count:,} images of {image_set.path}, not of {n}")
    return np.linspace(0, count - 1, n).round().astype(int)


def bound_on_images(
    model: Model, image_set: ImageSet, rows: np.ndarray, steps: int | None = None, batch_size: int = 50
) -> VariationalBound:
    """The bound of `model` on the images `rows` of a set; its noise is keyed by the row, the same for every model.

    Args:
        model: from `load`.
        image_set: with the model's classes.
        rows: numbers of images.
        steps: timesteps of the bound; by default all of the model's.
        batch_size: images at once; changes speed and memory only.

    Raises:
        UserError: other classes or another size of images, a model without a bound, or more steps than it has.
    """
    has_classes = model.config.model.class_conditional
    if has_classes and image_set.class_names != model.class_names:
        raise UserError(f"the classes of {image_set.path} are not those of the run {model.source}")
    height, width, channels = image_set.images.shape[1:]
    if (channels, height, width) != tuple(model.config.model.image_shape):
        wanted = "x".join(map(str, model.config.model.image_shape[1:]))
        raise UserError(f"the images of {image_set.path} are {height}x{width}, those of {model.source} are {wanted}")
    if not has_bound(model.config):
        raise UserError(f"{model.source} has no bound: it was trained in continuous time, or without its variances")
    sampling = SamplingConfig(steps=steps)
    denoiser, schedule = model.denoiser(sampling), build_schedule(model.config.diffusion, sampling)
    bounds = []
    with torch.inference_mode():
        for part in progress(iterable=np.array_split(rows, -(-len(rows) // batch_size)), desc="bound", unit="batch"):
            x_start = torch.from_numpy(image_set.images[part]).to(model.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            y = torch.from_numpy(image_set.labels[part]).to(model.device) if has_classes else None
            noise = PerSampleNoise([(0, 0, int(row)) for row in part], tuple(x_start.shape[1:]), model.device)
            bounds.append(variational_bound(denoiser, schedule, x_start, y, noise))
    columns = ("vlb", "xstart_mse", "mse", "prior", "total")
    return VariationalBound(*(torch.cat([getattr(bound, name) for bound in bounds]).cpu() for name in columns))
