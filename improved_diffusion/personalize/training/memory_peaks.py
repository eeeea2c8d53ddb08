"""The passes of a fine-tuning run on PyTorch's meta device, where tensors have sizes but hold nothing, and the bytes
that are alive at the worst moment of each: see `estimate_memory`."""

from __future__ import annotations

import contextlib
import copy
import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from improved_diffusion.personalize.config import PersonalizeConfig
from improved_diffusion.personalize.generate import mixed_type
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.models.encoding import encode_texts, latent_moments
from improved_diffusion.personalize.models.quantize import WEIGHT_BYTES
from improved_diffusion.personalize.models.trained import Trained, resolution_of
from improved_diffusion.personalize.training.emulation import GPUArithmetic, LiveBytes


def without_weights(base: Base, adds_words: bool) -> Base:
    """The same architecture on the meta device, with tokenizers of its own if `adds_words`: they take long to copy."""
    pipeline = copy.copy(base.pipeline)
    with torch.device("meta"):
        for name in ("unet", "vae"):
            part = getattr(base.pipeline, name)
            setattr(pipeline, name, type(part).from_config(part.config))
        for name, encoder in base.text_encoders.items():
            setattr(pipeline, name, type(encoder)(encoder.config))
            if adds_words:
                tokenizer = name.replace("text_encoder", "tokenizer")
                setattr(pipeline, tokenizer, copy.deepcopy(getattr(pipeline, tokenizer)))
    return replace(base, pipeline=pipeline)


def weight_bytes(part: nn.Module, kind: str | None) -> int:
    """Of `part`, the frozen linear layers of which are quantized in that way."""
    size = sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
    if kind is not None:
        weights = [m.weight for m in part.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
        size += sum(round(WEIGHT_BYTES[kind] * weight.numel()) - weight.nbytes for weight in weights)
    return size


@torch.no_grad()
def peaks_of_look(model: Base, config: PersonalizeConfig) -> tuple[int, int]:
    """Bytes of what the UNet makes in denoising as many pictures as are drawn at once, and the autoencoder of one."""
    watch, vae, side = config.watch, model.pipeline.vae, _latent_side(model, config)
    count = watch.batch_size * (2 if watch.guidance_scale > 1 else 1)
    for part in (model.unet, *model.text_encoders.values()):
        part.eval()
    with LiveBytes() as denoising, GPUArithmetic(mixed_type(model)):
        _predict(model, count, side, model.unet.dtype)
    with LiveBytes() as decoding, GPUArithmetic():
        latent = torch.empty(1, vae.config.latent_channels, side, side, dtype=vae.dtype, device="meta")
        vae.decode(latent).sample.float()
    return denoising.peak, decoding.peak


def peak_of_encoding(model: Base, config: PersonalizeConfig, count: int) -> int:
    """Bytes of what the autoencoder makes of so many images."""
    with LiveBytes() as live:
        _encode_images(model, config, count)
    return live.peak


def peak_of_step(
    model: Base, trained: Trained, config: PersonalizeConfig, dtype: torch.dtype
) -> tuple[int, set[nn.Parameter]]:
    """Bytes of what forward and backward passes make, gradients among it, which stay but in `fused_backward`; and the
    parameters that have one: the last layer of SDXL's first text encoder is not used, and has none."""
    if config.training.gradient_checkpointing:
        settings = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), GPUArithmetic(dtype))}
        model.unet.enable_gradient_checkpointing(functools.partial(checkpoint, **settings))
        for encoder in model.text_encoders.values():
            encoder.gradient_checkpointing_enable(settings)
    for part in trained.parts:
        getattr(model.pipeline, part).train()
    learning: set[nn.Parameter] = set()

    def note(parameter: nn.Parameter) -> None:
        learning.add(parameter)
        if config.training.fused_backward:
            parameter.grad.square()  # an update makes as much again
            parameter.grad = None

    for parameter in trained.parameters.values():
        parameter.register_post_accumulate_grad_hook(note)
    with LiveBytes() as live:
        for _ in range(min(config.training.accumulation, 2)):  # in the second, there are gradients from the start
            _loss(model, config, dtype).backward()
    return live.peak, learning


def _loss(model: Base, config: PersonalizeConfig, dtype: torch.dtype) -> Tensor:
    """Of a micro-batch, the images of the prior included."""
    count = config.training.batch_size * (2 if config.has_prior else 1)
    if not config.images.cache:
        _encode_images(model, config, config.training.batch_size)
    with GPUArithmetic(dtype):
        predicted = _predict(model, count, _latent_side(model, config), dtype, config.trains_text)
    return F.mse_loss(predicted.float(), torch.empty(predicted.shape, device="meta"))


def _encode_images(model: Base, config: PersonalizeConfig, count: int) -> None:
    side = resolution_of(config, model)
    with GPUArithmetic():
        latent_moments(model, torch.empty(count, 3, side, side, device="meta"))


def _latent_side(model: Base, config: PersonalizeConfig) -> int:
    return resolution_of(config, model) // model.pipeline.vae_scale_factor


def _predict(model: Base, count: int, side: int, dtype: torch.dtype, text_grad: bool = False) -> Tensor:
    """What the UNet says of `count` latents in `dtype` under texts, through which gradients may flow."""
    x_t = torch.empty(count, model.unet.config.in_channels, side, side, dtype=dtype, device="meta")
    t, size_ids = torch.empty(count, device="meta"), torch.empty(count, 6, device="meta")
    with torch.set_grad_enabled(text_grad):
        conditions = encode_texts(model, [""] * count)
    added = {"text_embeds": conditions["pooled"], "time_ids": size_ids} if model.is_sdxl else None
    states = conditions["states"].to(dtype)
    return model.unet(x_t, t, encoder_hidden_states=states, added_cond_kwargs=added).sample
