"""Drawing images. Image number i of class c of seed s is the same whatever else is drawn beside it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from improved_diffusion.config import Config, SamplingConfig
from improved_diffusion.diffusion.denoiser import ClippedDenoiser, Denoiser
from improved_diffusion.diffusion.noise import NOISES, PerSampleNoise, PhiloxNoise
from improved_diffusion.diffusion.samplers import SAMPLERS, OnStep
from improved_diffusion.errors import UserError
from improved_diffusion.models.build import build_schedule, number_of_steps

BATCH_ON_CPU = 32  # the feature maps of more images leave the caches, and their memory is touched anew in each layer
SEEDS = range(2**63)  # that records of images have room for


class SampleKey(NamedTuple):
    """Which image: the seed, the class's index (0 for a model without classes), and the number within the class."""

    seed: int
    class_index: int
    number: int


def sampling_record(config: Config, sampling: SamplingConfig) -> dict[str, Any]:
    """What records say of how images were drawn, of a model that was trained as `config` says."""
    interval = sampling.guidance_interval
    # Records that are older than the choice say nothing of it.
    noise = {} if sampling.noise == "numpy" else {"noise": sampling.noise}
    return {
        "sampler": sampling.sampler,
        "sampling_steps": number_of_steps(config.diffusion, sampling),
        "spacing": sampling.chosen_spacing,
        "sampler_options": dict(sorted(sampling.options.items())),
        "guidance_scale": sampling.guidance_scale,
        "guidance_interval": "everywhere" if interval is None else list(interval),
        **noise,
    }


def require_drawable(config: Config, keys: Sequence[SampleKey], sampling: SamplingConfig, device: torch.device) -> None:
    """Raise at once the UserError that `generate` would raise of these keys and settings."""
    build_schedule(config.diffusion, sampling)
    _noise_of([max(keys), *keys[:1]], config, sampling, device)


def generate(
    denoiser: Denoiser,
    keys: Sequence[SampleKey],
    config: Config,
    sampling: SamplingConfig,
    device: torch.device,
    on_step: OnStep | None = None,
) -> Iterator[tuple[Sequence[SampleKey], Tensor]]:
    """Draw the images of `keys`, as many at a time as `batch_size_on` says.

    Yields (keys, uint8 (N, H, W, C) on `device`) of each batch, in order. A last batch that is short, and one of a
    single image, is filled up with repetitions, which are dropped: a network's arithmetic may depend on the size of its
    batch in the last digits, and that of a single image does, as matrix products become products with a vector. The
    samplers' callback `on_step` sees the batch as it is filled up.

    Raises:
        UserError: settings that do not fit the model, or keys for which the generator of the noise has no room.
    """
    schedule = build_schedule(config.diffusion, sampling)
    callback = {} if on_step is None else {"on_step": on_step}
    sampler = functools.partial(SAMPLERS[sampling.sampler], **sampling.options, **callback)
    at_once = batch_size_on(device, sampling)
    size = max(2, min(at_once, len(keys)))
    for first in range(0, len(keys), at_once):
        batch = list(keys[first : first + at_once])
        full = batch + [batch[-1]] * (size - len(batch))
        draw_noise = _noise_of(full, config, sampling, device)
        y = torch.tensor([key.class_index for key in full], device=device) if config.model.class_conditional else None
        x = sampler(ClippedDenoiser(denoiser), schedule, draw_noise(), y, draw_noise)
        if not x.isfinite().all():  # as uint8 it would be a black picture
            raise UserError(
                "the network's pictures are not finite numbers: its weights are damaged, or training failed"
            )
        yield batch, to_uint8(x[: len(batch)])


def _noise_of(
    keys: Sequence[SampleKey], config: Config, sampling: SamplingConfig, device: torch.device
) -> PerSampleNoise | PhiloxNoise:
    try:
        return NOISES[sampling.noise](keys, config.model.image_shape, device)
    except ValueError as error:
        raise UserError(str(error)) from error


def batch_size_on(device: torch.device, sampling: SamplingConfig) -> int:
    """Images that are drawn at once: `sampling.batch_size`, but on a CPU no more than are fast there."""
    return min(sampling.batch_size, BATCH_ON_CPU) if device.type == "cpu" else sampling.batch_size


def to_uint8(x: Tensor) -> Tensor:
    """Images (N, C, H, W) on [-1, 1] as uint8 (N, H, W, C), rounded to the nearest grey level."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
