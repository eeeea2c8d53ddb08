"""Images from a model. Image number i of class c of seed s is the same whatever else is drawn beside it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from improved_diffusion.checkpoint_file import read_checkpoint
from improved_diffusion.config import Config, SamplingConfig
from improved_diffusion.diffusion.denoiser import ClippedDenoiser, Denoiser, Network
from improved_diffusion.diffusion.noise import PerSampleNoise
from improved_diffusion.diffusion.samplers import SAMPLERS
from improved_diffusion.errors import UserError
from improved_diffusion.files import file_sha256
from improved_diffusion.models import Backbone
from improved_diffusion.models.build import (
    build_denoiser,
    build_network,
    build_sampling_denoiser,
    build_schedule,
    number_of_steps,
    set_weights,
)
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.runtime.devices import arithmetic, sampling_precision, with_autocast


class SampleKey(NamedTuple):
    """Which image: the seed, the class's index (0 for a model without classes), and the number within the class."""

    seed: int
    class_index: int
    number: int


@dataclass(frozen=True)
class LoadedModel:
    """A trained network in evaluation mode, with what is needed to sample from it."""

    config: Config
    precision: str  # what it is drawn in here: see `sampling_precision`
    network: Backbone
    class_names: tuple[str, ...]
    step: int
    checkpoint: Path
    ema_rate: float | None = None  # of the moving average that the weights are; None: of none
    guide: LoadedModel | None = None  # a worse model of the same images, for autoguidance

    @functools.cached_property
    def checkpoint_sha256(self) -> str:
        """Hash of the checkpoint's file."""
        return file_sha256(self.checkpoint)


def load_model(
    run_path: Path | str, device: torch.device, checkpoint: str | None = None, ema: float | None = None
) -> LoadedModel:
    """The model of a run: a moving average of its weights, or the weights where it keeps none.

    Args:
        run_path: a run directory.
        device: where the network is wanted.
        checkpoint: `best`, `latest`, or the name of one; by default the best one, or else the latest.
        ema: rate of the moving average; by default the first.

    Raises:
        UserError: not a run directory, no such checkpoint, a damaged one, or one without that moving average.
    """
    run = RunDirectory(Path(run_path))
    config = run.read_config()
    file = run.choose_checkpoint(checkpoint)
    state = read_checkpoint(file, ("step", "model", "ema", "class_names"))
    network = build_network(config, len(state["class_names"]))
    averages = {float(rate): weights for rate, weights in (state["ema"] or {}).items()}
    if ema is not None and ema not in averages:
        stored = f"it has those of {', '.join(map(str, averages))}" if averages else "it has none"
        raise UserError(f"{file} has no moving average of rate {ema}: {stored}")
    rate = next(iter(averages), None) if ema is None else ema
    set_weights(network, state["model"] if rate is None else averages[rate])
    network.to(device, memory_format=torch.channels_last).eval()
    precision = sampling_precision(config.training.precision, device)
    return LoadedModel(config, precision, network, tuple(state["class_names"]), state["step"], file, rate)


def with_guide(model: LoadedModel, guide: LoadedModel) -> LoadedModel:
    """`model`, to be guided by `guide`.

    Raises:
        UserError: the guide draws other images, or another forward process than the model's.
    """
    if guide.class_names != model.class_names or guide.config.model.image_shape != model.config.model.image_shape:
        raise UserError(
            f"{guide.checkpoint} cannot guide {model.checkpoint}: it was trained on other classes or sizes of images"
        )
    own, of_guide = ((c.diffusion.schedule, c.diffusion.timesteps) for c in (model.config, guide.config))
    if own != of_guide or guide.config.model.class_conditional != model.config.model.class_conditional:
        raise UserError(
            f"{guide.checkpoint} cannot guide {model.checkpoint}: diffusion.schedule, diffusion.timesteps and "
            "model.class_conditional must be the same"
        )
    return dataclasses.replace(model, guide=guide)


def model_denoiser(model: LoadedModel, sampling: SamplingConfig, device: torch.device) -> Denoiser:
    """The denoiser that samples from `model` as `sampling` says. Raises UserError as `build_sampling_denoiser` does."""
    network = _run_network(model, device)
    guide = None if model.guide is None else build_denoiser(model.guide.config, _run_network(model.guide, device))
    return build_sampling_denoiser(model.config, sampling, network, len(model.class_names), guide)


def _run_network(model: LoadedModel, device: torch.device) -> Network:
    return with_autocast(model.network, device, arithmetic(model.precision, device))


def sampling_record(config: Config, sampling: SamplingConfig) -> dict[str, Any]:
    """What records say of how images were drawn, of a model that was trained as `config` says."""
    interval = sampling.guidance_interval
    return {
        "sampler": sampling.sampler,
        "sampling_steps": number_of_steps(config.diffusion, sampling),
        "spacing": sampling.chosen_spacing,
        "sampler_options": dict(sorted(sampling.options.items())),
        "guidance_scale": sampling.guidance_scale,
        "guidance_interval": "everywhere" if interval is None else list(interval),
    }


def image_record(model: LoadedModel, sampling: SamplingConfig) -> dict[str, Any]:
    """What records say of images drawn from `model`: all that decides them, but for their keys and the code."""
    guide = model.guide
    return {
        "checkpoint_sha256": model.checkpoint_sha256,
        "step": model.step,
        "ema_rate": model.ema_rate,
        **sampling_record(model.config, sampling),
        "guide": None if guide is None else {"sha256": guide.checkpoint_sha256, "ema_rate": guide.ema_rate},
        "precision": model.precision,
    }


def generate(
    denoiser: Denoiser, keys: Sequence[SampleKey], config: Config, sampling: SamplingConfig, device: torch.device
) -> Iterator[tuple[Sequence[SampleKey], Tensor]]:
    """Draw the images of `keys`, `sampling.batch_size` at a time.

    Yields (keys, uint8 (N, H, W, 3) on `device`) of each batch, in order. A last batch that is short, and one of a
    single image, is filled up with repetitions, which are dropped: a network's arithmetic may depend on the size of its
    batch in the last digits, and that of a single image does, as matrix products become products with a vector.
    """
    schedule = build_schedule(config.diffusion, sampling)
    sample = functools.partial(SAMPLERS[sampling.sampler], ClippedDenoiser(denoiser), schedule, **sampling.options)
    batch_size = max(2, min(sampling.batch_size, len(keys)))
    for first in range(0, len(keys), sampling.batch_size):
        batch = list(keys[first : first + sampling.batch_size])
        full = batch + [batch[-1]] * (batch_size - len(batch))
        draw_noise = PerSampleNoise(full, config.model.image_shape, device)
        y = torch.tensor([key.class_index for key in full], device=device) if config.model.class_conditional else None
        x = sample(draw_noise(), y, draw_noise)
        yield batch, to_uint8(x[: len(batch)])


def to_uint8(x: Tensor) -> Tensor:
    """Images (N, 3, H, W) on [-1, 1] as uint8 (N, H, W, 3), rounded to the nearest grey level."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
