"""Drawing pictures with a base, tuned or not: from texts, and from texts and a picture."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import Tensor

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.data.crops import cut
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.models.encoding import decode_latents, encode_prompts, latent_moments

# {sampler: diffusers' scheduler}. Latents are not pictures: they are not clipped.
SAMPLERS: dict[str, type[SchedulerMixin]] = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}


class BrokenPicture(UserError):
    """What was drawn is no picture: the weights, or the arithmetic, are broken."""


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn."""

    steps: int = 30
    guidance_scale: float = 7.5
    negative_prompt: str = ""
    height: int | None = None  # pixels; by default what the base was made for
    width: int | None = None
    strength: float = 0.6  # of a picture to start from: 0 leaves it, 1 forgets it
    sampler: str | None = None  # one of SAMPLERS; by default the base's own

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"sampling takes at least 1 step, not {self.steps}")
        if not math.isfinite(self.guidance_scale):
            raise UserError(f"the guidance scale must be a number, not {self.guidance_scale}")
        if not 0 < self.strength <= 1:
            raise UserError(f"the strength must be above 0 and at most 1, not {self.strength}")
        if self.sampler not in (None, *SAMPLERS):
            raise UserError(f"the sampler must be one of {', '.join(SAMPLERS)}, not {self.sampler}")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None and (value < 8 or value % 8):
                raise UserError(f"the {name} must be a multiple of 8, not {value}")


def draw(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    batch_size: int = 4,
    start: Image.Image | None = None,
    on_step: Callable[[float], None] | None = None,
) -> Iterator[Image.Image]:
    """A picture for each prompt and seed, one after the other.

    The noise of a picture depends on its own seed alone and is drawn on the CPU: neither the batch nor the device
    changes it. On a CPU pictures are drawn one at a time, so that whatever is drawn beside it changes no bit of one:
    matrix products of other sizes have other last digits, which a strongly adapted network makes a hundred million
    times as large, and a batch would save next to nothing there.

    Args:
        base: tuned or not, on its device.
        prompts: N texts.
        seeds: N numbers.
        sampling: how.
        batch_size: pictures at once, on a GPU.
        start: a picture to start from (image-to-image), fitted to the size of the output.
        on_step: called after every sampling step with the part of the work that is done, 0 to 1.
    """
    height, width = sampling.height or base.resolution, sampling.width or base.resolution
    settings = {
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
        "output_type": "latent",  # decoded here, in the autoencoder's own arithmetic
    }
    pipeline = _pipeline(base, sampling.sampler, start is not None)
    if start is None:
        settings |= {"height": height, "width": width}
    else:
        if int(sampling.steps * sampling.strength) < 1:
            raise UserError(f"strength {sampling.strength} leaves none of {sampling.steps} steps: raise one of them")
        settings |= {"strength": sampling.strength}
        latents = latent_moments(base, cut(start, (height, width)).pixels[None])[0]
    if base.device.type == "cpu":
        batch_size = 1
    for first in range(0, len(prompts), batch_size):
        batch = slice(first, first + batch_size)
        texts = list(prompts[batch])
        if on_step is not None:
            settings["callback_on_step_end"] = _callback(on_step, first, len(texts), len(prompts))
        if start is not None:
            settings["image"] = latents.to(base.unet.dtype).expand(len(texts), -1, -1, -1)
        with _arithmetic(base):
            output = pipeline(
                **encode_prompts(base, texts, sampling.negative_prompt, sampling.guidance_scale > 1),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[batch]],
                **settings,
            )
        drawn: Tensor = output.images
        if not torch.isfinite(drawn).all():
            raise BrokenPicture(f"the network drew what is no picture (NaN) for {texts[0]!r}: use bf16 or float32")
        yield from decode_latents(base, drawn)
        base.pipeline.maybe_free_model_hooks()  # of what `enable_model_cpu_offload` has brought


def _callback(on_step: Callable[[float], None], before: int, batch: int, total: int) -> Callable[..., dict[str, Any]]:
    """In diffusers' form, for a batch that `before` of the `total` pictures come before."""

    def after_step(pipeline: Any, step: int, timestep: object, values: dict[str, Any]) -> dict[str, Any]:
        on_step((before + batch * (step + 1) / pipeline.num_timesteps) / total)
        return values

    return after_step


def mixed_type(base: Base) -> torch.dtype | None:
    """The shorter type of a base whose parts have several, in which it draws under autocast: what is being trained is
    float32, whatever the rest is. None where all have one."""
    types = {part.dtype for part in (base.unet, *base.text_encoders.values())}
    return (types - {torch.float32}).pop() if len(types) > 1 else None


def _arithmetic(base: Base) -> contextlib.AbstractContextManager:
    shorter = mixed_type(base)
    return contextlib.nullcontext() if shorter is None else torch.autocast(base.device.type, dtype=shorter)


def _pipeline(
    base: Base, sampler: str | None, from_picture: bool
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """The base's own, or its parts in one with another scheduler, or in one that starts from a picture.

    Not by `from_pipe`, which casts the shared network to float32.
    """
    if sampler is None and not from_picture:
        return base.pipeline
    kind = type(base.pipeline)
    if from_picture:
        kind = StableDiffusionXLImg2ImgPipeline if base.is_sdxl else StableDiffusionImg2ImgPipeline
    parts = base.pipeline.components
    if sampler is not None:
        parts["scheduler"] = SAMPLERS[sampler].from_config(base.pipeline.scheduler.config, clip_sample=False)
    pipeline = kind(**parts, **({} if base.is_sdxl else {"requires_safety_checker": False}))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
