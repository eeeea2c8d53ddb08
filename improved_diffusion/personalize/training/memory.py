"""GPU memory that a run will need, computed before it starts: of its worst moments, each with what is there then.

They are run on PyTorch's meta device, where tensors have sizes but hold nothing: with the real architecture, the real
adapters and the arithmetic of a GPU. What is alive at the worst moment is added up, so that what the backward pass does
not need is not counted, and gradient checkpointing counts for what it keeps and what it computes again.

Left out are what a kernel uses within one operation and the fragmentation of the allocator; and, as they take less than
the others at the sizes of SD and SDXL, what the judges make of a picture, and encoding the texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import FUSABLE, PersonalizeConfig
from improved_diffusion.personalize.models.base import DTYPES, TILE, Base
from improved_diffusion.personalize.models.trained import needed_for_updates, prepare, resolution_of
from improved_diffusion.personalize.training.memory_peaks import (
    peak_of_encoding,
    peak_of_step,
    peaks_of_look,
    weight_bytes,
    without_weights,
)
from improved_diffusion.personalize.training.optimizers import state_bytes
from improved_diffusion.runtime.devices import bf16_hardware
from improved_diffusion.runtime.meta import KnownLayouts

MOMENTS = {  # {name: in a sentence}
    "encoding": "encoding the images",
    "step": "a training step",
    "look": "a look at the run",
    "judging": "judging its pictures",
}
FRUGAL = ("adafactor", "paged_adamw_8bit")  # optimizers of which no other takes less memory
ALLOWANCE = 500_000_000  # bytes, of CUDA itself above all; a round figure, as it differs by GPU and driver


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of GPU memory that a run takes at its worst moments: encoding its images, a training step, drawing the
    pictures of a look, and judging these. Between looks the judges are elsewhere, and what updates do not need too."""

    weights: dict[str, int]
    """{component: bytes}, each in its own type."""
    needed: tuple[str, ...]
    """The components that an update works with."""
    judges: int
    """The networks that measure pictures."""
    gradients: int
    """Of what is trained, in float32; between steps there are none."""
    optimizer: int
    """Its state."""
    averages: int
    """The moving average of what is trained."""
    activations: int
    """What the step needs beside all that. Gradients come as activations go, so that they share room; what is counted
    here is what does not fit into that of the gradients."""
    encodes: bool
    """Whether it is in encoding its images that a step needs most."""
    swapped: int
    """What is trained, kept aside while its moving average is looked at."""
    encoding: int
    """What the autoencoder makes of an image before the first update."""
    denoising: int
    """What the UNet makes on its way through the pictures that are drawn at once."""
    decoding: int
    """What the autoencoder makes of the latents of one picture."""
    side: int
    """Pixels a side of the images and pictures."""
    draws: bool = True
    """Whether the run draws anything: a prior, or for looks."""
    offload: bool = False
    """Whether only the part that is at work is there while pictures are drawn."""
    allowance: int = ALLOWANCE
    """For what is not counted."""

    @property
    def step(self) -> int:
        """Bytes of a training step."""
        return sum(self.parts("step").values())

    @property
    def look(self) -> int:
        """Bytes of drawing for a look: of the UNet's work or the autoencoder's, whichever is more."""
        return sum(self.parts("look").values())

    @property
    def moments(self) -> dict[str, int]:
        """{one of MOMENTS: its bytes} of those that the run has."""
        has = {"encoding": True, "step": True, "look": self.draws, "judging": self.judges > 0}
        return {moment: sum(self.parts(moment).values()) for moment in MOMENTS if has[moment]}

    @property
    def total(self) -> int:
        return max(self.moments.values())

    def parts(self, moment: str) -> dict[str, int]:
        """What there is at one of MOMENTS: {name: bytes}."""
        needed = sum(self.weights[name] for name in self.needed)
        learned = {"optimizer": self.optimizer, "averages": self.averages}
        if moment == "encoding":
            parts = {"weights": self.weights["vae"], "judges": self.judges, "encoding": self.encoding}
        elif moment == "step":
            parts = {"weights": needed, "gradients": self.gradients, **learned, "activations": self.activations}
        elif moment == "look":
            weights, work, size = self._drawing()
            parts = {"weights": weights, **learned, "swapped": self.swapped, work: size}
        else:
            parts = {"weights": needed, "judges": self.judges, **learned, "swapped": self.swapped}
        return {**parts, "allowance": self.allowance}

    def _drawing(self) -> tuple[int, str, int]:
        """In drawing a picture, the weights that are there, the work that takes most beside them, and what it takes."""
        work = {"unet": ("denoising", self.denoising), "vae": ("decoding", self.decoding)}
        if self.offload:
            return max(((size, *work.get(name, ("denoising", 0))) for name, size in self.weights.items()), key=_bytes)
        return sum(self.weights.values()), *max(work.values(), key=lambda one: one[1])

    def __str__(self) -> str:
        lines = []
        for moment in self.moments:
            parts = self.parts(moment)
            named = " + ".join(f"{name} {_amount(size)}" for name, size in parts.items() if size >= 1e6)
            largest = " (the largest)" if sum(parts.values()) == self.total else ""
            lines.append(f"{moment}: {named} = {_amount(sum(parts.values()))}{largest}")
        return "\n".join(lines)


def _bytes(stage: tuple[int, str, int]) -> int:
    return stage[0] + stage[2]


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
    model = without_weights(base, adds_words=config.method == "textual_inversion")
    training = config.training
    model.to("meta", precision, training.vae_precision)
    if training.vae_tiling:
        model.tile_vae()
    trained = prepare(model, config)
    with KnownLayouts():
        denoising, decoding = peaks_of_look(model, config)
        encoding = peak_of_encoding(model, config, 1)
        at_a_step = 0 if config.images.cache else peak_of_encoding(model, config, training.batch_size)
        peak, learning = peak_of_step(model, trained, config, DTYPES[precision])
    gradients = 4 * sum(parameter.numel() for parameter in learning)
    if training.fused_backward:
        gradients = 0  # there is never more than one, which the peak has
    averages = 0 if training.ema_rate is None else 4 * trained.count
    return MemoryEstimate(
        weights={
            name: weight_bytes(part, config.quantize if name == "unet" else None)
            for name, part in model.networks.items()
        },
        needed=tuple(needed_for_updates(model, config)),
        judges=judges,
        gradients=gradients,
        optimizer=round(sum(state_bytes(training.optimizer, parameter) for parameter in learning)),
        averages=averages,
        activations=peak - gradients,
        encodes=at_a_step > 0 and at_a_step + (gradients if training.accumulation > 1 else 0) >= peak,
        swapped=averages,
        encoding=encoding,
        denoising=denoising,
        decoding=decoding,
        side=resolution_of(config, model),
        draws=config.watch.every is not None or config.prior.images > 0,
        offload=config.watch.offload,
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
    needs = {MOMENTS[moment]: size for moment, size in estimate.moments.items()}
    if estimate.total <= available:
        return
    largest, *others = sorted(needs, key=needs.get, reverse=True)
    raise NotEnoughMemory(
        f"{largest} needs about {_amount(needs[largest])}, "
        + ", ".join(f"{name} {_amount(needs[name])}" for name in others)
        + f", and {device} has {_amount(available)} free; to need less: "
        + ", ".join(_remedies(estimate, available, config, precision, bf16_hardware(device) is not None))
    )


def _remedies(
    estimate: MemoryEstimate, available: int, config: PersonalizeConfig, precision: str, fast_at_bf16: bool
) -> list[str]:
    """Settings that lower what does not fit."""
    training, watch, is_full = config.training, config.watch, config.method == "full"
    encoding, step, look, judging = (estimate.moments.get(moment, 0) > available for moment in MOMENTS)
    after_encoding = step or look or judging
    decodes = look and estimate.decoding > estimate.denoising
    fuses = is_full and training.optimizer in FUSABLE and training.accumulation == 1 and precision != "fp16"
    fuses = fuses and estimate.activations < estimate.gradients  # or the peak comes before the gradients
    remedies = {
        "training.gradient_checkpointing true": step and not (training.gradient_checkpointing or estimate.encodes),
        "training.batch_size 1 and more training.accumulation": step and training.batch_size > 1,
        # Of weights in training there would be a second copy in the shorter type, which a look does not make up for.
        f"training.precision {'bf16' if fast_at_bf16 else 'fp16'}": precision == "float32"
        and (step or after_encoding and not is_full),
        "images.cache true": step and estimate.encodes,
        "training.vae_tiling true": (encoding or decodes) and estimate.side > TILE and not training.vae_tiling,
        # In fp16 the autoencoder of SDXL overflows.
        "training.vae_precision bf16": (encoding or decodes) and fast_at_bf16 and training.vae_precision == "float32",
        "watch.offload true": look and not watch.offload,
        "watch.batch_size 1": look and not decodes and watch.batch_size > 1,
        "quantize nf4": after_encoding and not is_full and config.quantize != "nf4",
        "training.optimizer adafactor": after_encoding and is_full and training.optimizer not in FRUGAL,
        "training.fused_backward true and training.grad_clip null": step and fuses and not training.fused_backward,
        "training.ema_rate null": after_encoding and is_full and training.ema_rate is not None,
        "train_text_encoder false": step and config.train_text_encoder,
        "method lora": after_encoding and is_full,
        "watch.clip null": (encoding or judging) and watch.clip is not None,
        "a smaller images.resolution": encoding or step or look,
    }
    return [remedy for remedy, helps in remedies.items() if helps]
