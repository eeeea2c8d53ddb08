"""How images come about: the reverse process, as what the model takes the image to be at some moments of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from improved_diffusion.config import SamplingConfig
from improved_diffusion.diffusion.denoiser import Prediction
from improved_diffusion.models.build import number_of_steps
from improved_diffusion.sampling.generate import SampleKey, to_uint8
from improved_diffusion.sampling.grids import make_grid
from improved_diffusion.sampling.model import Model

MOMENTS = 9
ROWS = 12  # more make a picture that no one looks at


def reverse_process(
    model: Model,
    keys: Sequence[SampleKey],
    sampling: SamplingConfig,
    moments: int = MOMENTS,
    on_step: Callable[[int], None] = lambda step: None,
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The model's estimates of x_0, spread evenly over the steps from the first to the last.

    x_0 and not x_t, which is noise for most of the way; at the last step it is the image.

    Args:
        model: whose.
        keys: which images.
        sampling: how they are drawn.
        moments: how many estimates.
        on_step: called after every step with the number of those that are left.

    Returns:
        uint8 (len(keys), moments, H, W, C), fewer moments where there are fewer steps; and which steps, from 1.

    Raises:
        UserError: settings that the model cannot follow.
    """
    steps = number_of_steps(model.config.diffusion, sampling)
    shown = tuple(np.linspace(1, steps, min(moments, steps)).round().astype(int).tolist())
    estimates: list[np.ndarray] = []

    def keep(step: int, prediction: Prediction) -> None:
        if steps - step in shown:
            estimates.append(to_uint8(prediction.x_start).cpu().numpy())
        on_step(step)

    rows = []
    for batch, _ in model.draw(keys, sampling, on_step=keep):
        rows.append(np.stack(estimates, axis=1)[: len(batch)])
        estimates.clear()
    return np.concatenate(rows), shown


def draw_strip(model: Model, keys: Sequence[SampleKey], sampling: SamplingConfig) -> np.ndarray:
    """A picture of `reverse_process`, uint8 (height, width, 3): a row for the first image of each class in `keys`, of
    at most 12 classes."""
    first = {key.class_index: key for key in reversed(keys)}
    chosen = [first[label] for label in sorted(first)[:ROWS]]
    images, steps = reverse_process(model, chosen, sampling)
    titles = tuple(model.row_names[key.class_index] for key in chosen)
    return make_grid(images, titles, tuple(map(str, steps)), "x_0 at step")
