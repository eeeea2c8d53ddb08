"""GPU memory that a run will need, computed before it starts: that of a training step, and that of a look at the run.

Both are run on PyTorch's meta device, where tensors have sizes but hold nothing: with the real architecture, the real
adapters and the arithmetic of a GPU. What is alive at the worst moment is added up, so that what the backward pass does
not need is not counted, and gradient checkpointing counts for what it keeps and what it computes again.

Left out are what a kernel uses within one operation and the fragmentation of the allocator; and, as they take less than
drawing does at the sizes of SD and SDXL, what the judges make of a picture, encoding the images and drawing the prior.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import PersonalizeConfig
from improved_diffusion.personalize.generate import mixed_type
from improved_diffusion.personalize.models.base import DTYPES, Base
from improved_diffusion.personalize.models.encoding import encode_texts, latent_moments
from improved_diffusion.personalize.models.trained import Trained, prepare, resolution_of
from improved_diffusion.personalize.training.emulation import GPUArithmetic, LiveBytes
from improved_diffusion.personalize.training.optimizers import STATE_BYTES
from improved_diffusion.runtime.devices import bf16_hardware
from improved_diffusion.runtime.meta import KnownLayouts

ALLOWANCE = 500_000_000  # bytes, of CUDA itself above all; a round figure, as it differs by GPU and driver
# Bytes of a weight by its bits; in 4 bits, blocks of 64 share a float32 scale (Dettmers et al. 2023, arXiv:2305.14314).
QUANTIZED = {8: 1, 4: 1 / 2 + 4 / 64}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of GPU memory that a run takes at the worst moments of a training step and of a look."""

    weights: int
    """All parts of the model on the GPU, each in its own type."""
    judges: int
    """The networks that measure pictures."""
    gradients: int
    """Of what is trained, in float32; between steps there are none."""
    optimizer: int
    """Adam's moments."""
    averages: int
    """The moving average of what is trained."""
    activations: int
    """What the step needs beside all that. Gradients come as activations go, so that they share room; what is counted
    here is what does not fit into that of the gradients."""
    encodes: bool
    """Whether it is in encoding its images that a step needs most."""
    swapped: int
    """What is trained, kept aside while its moving average is looked at."""
    denoising: int
    """What the UNet makes on its way through the pictures that are drawn at once."""
    decoding: int
    """What the autoencoder makes of the latents of one picture."""
    allowance: int = ALLOWANCE
    """For what is not counted."""

    @property
    def step(self) -> int:
        """Bytes of a training step."""
        return sum(self.parts("step").values())

    @property
    def look(self) -> int:
        """Bytes of a look: of the UNet's work or the autoencoder's, whichever is more."""
        return sum(self.parts("look").values())

    @property
    def total(self) -> int:
        return max(self.step, self.look)

    def parts(self, moment: str) -> dict[str, int]:
        """What there is at the `moment`, step or look: {name: bytes}."""
        drawing = "decoding" if self.decoding > self.denoising else "denoising"
        names = {
            "step": ("weights", "judges", "gradients", "optimizer", "averages", "activations", "allowance"),
            "look": ("weights", "judges", "optimizer", "averages", "swapped", drawing, "allowance"),
        }
        return {name: getattr(self, name) for name in names[moment]}

    def __str__(self) -> str:
        lines = []
        for moment in ("step", "look"):
            parts = self.parts(moment)
            named = " + ".join(f"{name} {_amount(size)}" for name, size in parts.items() if size >= 1e6)
            larger = " (the larger)" if sum(parts.values()) == self.total else ""
            lines.append(f"{moment}: {named} = {_amount(sum(parts.values()))}{larger}")
        return "\n".join(lines)


def _amount(size: float) -> str:
    """Bytes as GB (10^9) or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def estimate_memory(base: Base, config: PersonalizeConfig, precision: str, judges: int = 0) -> MemoryEstimate:
    """The memory of a run of `config` on one GPU; buckets are taken for the square, which is the largest of them.

    Args:
        base: as it was opened, with weights or on the meta device; it is left as it is.
        precision: of the networks, as the run resolved it: float32, bf16 or fp16.
        judges: bytes of the networks that measure pictures.

    Raises:
        UserError: a token that does not fit, see `prepare`.
    """
    model = _without_weights(base, adds_words=config.method == "textual_inversion")
    training = config.training
    model.to("meta", precision, training.vae_precision)
    trained = prepare(model, config)
    with KnownLayouts():
        denoising, decoding = _peaks_of_look(model, config)
        encoding = 0 if config.images.cache else _peak_of_encoding(model, config)
        peak = _peak_of_step(model, trained, config, DTYPES[precision])
    # The last layer of SDXL's first text encoder, for one, is not used, and has neither gradient nor moments.
    learning = sum(parameter.numel() for parameter in trained.parameters.values() if parameter.grad is not None)

    # The looks at a run draw pictures, so that all parts stay there.
    on_gpu = (model.unet, *model.text_encoders.values(), model.pipeline.vae)
    averages = 0 if training.ema_rate is None else 4 * trained.count
    return MemoryEstimate(
        weights=sum(_weight_bytes(part, config.base_bits if part is model.unet else None) for part in on_gpu),
        judges=judges,
        gradients=4 * learning,
        optimizer=round(STATE_BYTES[training.optimizer] * learning),
        averages=averages,
        activations=peak - 4 * learning,
        encodes=encoding > 0 and encoding + (4 * learning if training.accumulation > 1 else 0) >= peak,
        swapped=averages,
        denoising=denoising,
        decoding=decoding,
    )


class NotEnoughMemory(UserError, MemoryError):
    """A run would not fit."""


def require_memory(
    estimate: MemoryEstimate, available: int, config: PersonalizeConfig, precision: str, device: torch.device
) -> None:
    """Raise NotEnoughMemory if a run of `config` needs more than the `available` bytes; it says what would need less.

    Args:
        estimate: of the run.
        available: what is free on `device` before anything of the run is there.
        config: of the run.
        precision: see `estimate_memory`.
        device: of the run.
    """
    needs = {"a training step": estimate.step, "a look at the run": estimate.look}
    if estimate.total <= available:
        return
    larger, smaller = sorted(needs, key=needs.get, reverse=True)
    raise NotEnoughMemory(
        f"{larger} needs about {_amount(needs[larger])}, {smaller} {_amount(needs[smaller])}, and {device} has "
        f"{_amount(available)} free; to need less: "
        + ", ".join(_remedies(estimate, available, config, precision, bf16_hardware(device) is not None))
    )


def _remedies(
    estimate: MemoryEstimate, available: int, config: PersonalizeConfig, precision: str, fast_at_bf16: bool
) -> list[str]:
    """Settings that lower what does not fit: the step, the look or both."""
    training, watch, is_full = config.training, config.watch, config.method == "full"
    step, look = estimate.step > available, estimate.look > available
    decodes = look and estimate.decoding > estimate.denoising
    remedies = {
        "training.gradient_checkpointing true": step and not (training.gradient_checkpointing or estimate.encodes),
        "training.batch_size 1 and more training.accumulation": step and training.batch_size > 1,
        # Of weights in training there would be a second copy in the shorter type, which a look does not make up for.
        f"training.precision {'bf16' if fast_at_bf16 else 'fp16'}": precision == "float32" and (step or not is_full),
        "images.cache true": step and estimate.encodes,
        # In fp16 the autoencoder of SDXL overflows.
        "training.vae_precision bf16": decodes and fast_at_bf16 and training.vae_precision == "float32",
        "watch.batch_size 1": look and not decodes and watch.batch_size > 1,
        "base_bits 4": not is_full and config.base_bits != 4,
        "training.optimizer adafactor": is_full and STATE_BYTES[training.optimizer] > 0,
        "training.ema_rate null": is_full and training.ema_rate is not None,
        "train_text_encoder false": config.train_text_encoder,
        "method lora": is_full,
        "watch.clip null": watch.clip is not None,
        "a smaller images.resolution": True,
    }
    return [remedy for remedy, helps in remedies.items() if helps]


def _without_weights(base: Base, adds_words: bool) -> Base:
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


def _weight_bytes(part: nn.Module, bits: int | None) -> int:
    """Of `part`, the frozen linear layers of which are held in so many bits."""
    size = sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
    if bits is not None:
        weights = [m.weight for m in part.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
        size += sum(round(QUANTIZED[bits] * weight.numel()) - weight.nbytes for weight in weights)
    return size


@torch.no_grad()
def _peaks_of_look(model: Base, config: PersonalizeConfig) -> tuple[int, int]:
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


def _peak_of_encoding(model: Base, config: PersonalizeConfig) -> int:
    """Bytes of what the autoencoder makes of the images of a micro-batch."""
    with LiveBytes() as live:
        _encode_images(model, config)
    return live.peak


def _peak_of_step(model: Base, trained: Trained, config: PersonalizeConfig, dtype: torch.dtype) -> int:
    """Bytes of what forward and backward passes make, gradients among it, which stay."""
    if config.training.gradient_checkpointing:
        settings = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), GPUArithmetic(dtype))}
        model.unet.enable_gradient_checkpointing(functools.partial(checkpoint, **settings))
        for encoder in model.text_encoders.values():
            encoder.gradient_checkpointing_enable(settings)
    for part in trained.parts:
        getattr(model.pipeline, part).train()
    with LiveBytes() as live:
        for _ in range(min(config.training.accumulation, 2)):  # in the second, there are gradients from the start
            _loss(model, config, dtype).backward()
    return live.peak


def _loss(model: Base, config: PersonalizeConfig, dtype: torch.dtype) -> Tensor:
    """Of a micro-batch, the images of the prior included."""
    count = config.training.batch_size * (2 if config.has_prior else 1)
    if not config.images.cache:
        _encode_images(model, config)
    with GPUArithmetic(dtype):
        predicted = _predict(model, count, _latent_side(model, config), dtype, config.trains_text)
    return F.mse_loss(predicted.float(), torch.empty(predicted.shape, device="meta"))


def _encode_images(model: Base, config: PersonalizeConfig) -> None:
    side = resolution_of(config, model)
    with GPUArithmetic():
        latent_moments(model, torch.empty(config.training.batch_size, 3, side, side, device="meta"))


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
