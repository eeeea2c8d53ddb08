"""What a run needs at its moments, in words; and where it does not fit, what would need less."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import AutoencoderKL

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import ImagesConfig, PersonalizeConfig, TrainingConfig, WatchConfig
from improved_diffusion.personalize.training import memory
from improved_diffusion.personalize.training.memory import MemoryEstimate, estimate_memory, require_memory

LARGE = ImagesConfig(resolution=64)  # at which activations count
UNCACHED = replace(LARGE, cache=False)
CHECKPOINTING = TrainingConfig(steps=1, precision="float32", gradient_checkpointing=True)
FULL = MemoryEstimate(
    weights={"unet": 10_300_000_000, "vae": 300_000_000, "text_encoder": 1_600_000_000},
    needed=("unet",),
    judges=1_800_000_000,
    gradients=10_300_000_000,
    optimizer=20_500_000_000,
    averages=0,
    activations=280_000_000,
    encodes=False,
    swapped=0,
    encoding=2_700_000_000,
    denoising=5_000_000_000,
    decoding=4_300_000_000,
    side=1024,
)
LORA = replace(FULL, gradients=90_000_000, optimizer=190_000_000, denoising=300_000_000)
LORA = replace(LORA, weights={**FULL.weights, "unet": 5_300_000_000})
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Says whether a GPU that is not there is fast at bf16."""
    return lambda fast: monkeypatch.setattr(memory, "bf16_hardware", lambda device: "there" if fast else None)


def test_the_moments_are_printed_and_the_largest_is_named():
    assert str(FULL) == (
        "encoding: weights 300 MB + judges 1.8 GB + encoding 2.7 GB + allowance 500 MB = 5.3 GB\n"
        "step: weights 10.3 GB + gradients 10.3 GB + optimizer 20.5 GB + activations 280 MB + allowance 500 MB = "
        "41.9 GB (the largest)\n"
        "look: weights 12.2 GB + optimizer 20.5 GB + denoising 5.0 GB + allowance 500 MB = 38.2 GB\n"
        "judging: weights 10.3 GB + judges 1.8 GB + optimizer 20.5 GB + allowance 500 MB = 33.1 GB"
    )
    assert "optimizer 190 MB + decoding 4.3 GB + allowance 500 MB = 12.2 GB (the largest)" in str(LORA)
    offloaded = str(replace(LORA, offload=True))
    assert "look: weights 5.3 GB + optimizer 190 MB + denoising 300 MB + allowance 500 MB = 6.3 GB" in offloaded
    assert list(replace(LORA, draws=False, judges=0).moments) == ["encoding", "step"]


def test_a_run_that_does_not_fit_is_told_what_would_need_less(gpu):
    gpu(fast=True)
    config = PersonalizeConfig(method="full", training=TrainingConfig(gradient_checkpointing=True))
    require_memory(FULL, int(80e9), config, "bf16", GPU)
    with pytest.raises(UserError) as error:
        require_memory(FULL, int(11.8e9), config, "bf16", GPU)
    assert str(error.value) == (
        "a training step needs about 41.9 GB, a look at the run 38.2 GB, judging its pictures 33.1 GB, encoding the "
        "images 5.3 GB, and cuda:0 has 11.8 GB free; to need less: watch.offload true, training.optimizer adafactor, "
        "training.fused_backward true and training.grad_clip null, method lora, watch.clip null, a smaller "
        "images.resolution"
    )


def test_where_only_the_look_does_not_fit_nothing_is_suggested_for_the_step(gpu):
    gpu(fast=True)
    config = PersonalizeConfig(training=TrainingConfig(batch_size=2), images=ImagesConfig(cache=False))
    with pytest.raises(UserError) as error:
        require_memory(replace(LORA, encodes=True), int(11.8e9), config, "bf16", GPU)
    assert str(error.value).partition("to need less: ")[2] == (
        "training.vae_tiling true, training.vae_precision bf16, watch.offload true, quantize nf4, a smaller "
        "images.resolution"
    )


@pytest.mark.parametrize(
    ("settings", "precision", "fast", "remedies"),
    [
        (
            {
                "base_bits": 4,
                "training": replace(CHECKPOINTING, vae_tiling=True),
                "watch": WatchConfig(offload=True),
            },
            "float32",
            True,
            "training.precision bf16, training.vae_precision bf16, watch.clip null",
        ),
        (  # as `auto` is float32 on a GPU that is slow at bf16
            {"training": TrainingConfig(batch_size=2, ema_rate=0.9)},
            "float32",
            False,
            "training.gradient_checkpointing true, training.batch_size 1 and more training.accumulation, "
            "training.precision fp16, training.vae_tiling true, watch.offload true, quantize nf4, watch.clip null",
        ),
        (
            {
                "method": "full",
                "train_text_encoder": True,
                "training": replace(CHECKPOINTING, ema_rate=0.9, accumulation=2),
            },
            "float32",
            True,
            "training.precision bf16, training.vae_tiling true, training.vae_precision bf16, watch.offload true, "
            "training.optimizer adafactor, training.ema_rate null, train_text_encoder false, method lora, "
            "watch.clip null",
        ),
    ],
)
def test_only_what_is_not_yet_set_is_suggested(gpu, settings, precision, fast, remedies):
    gpu(fast)
    with pytest.raises(UserError) as error:
        require_memory(LORA, 0, PersonalizeConfig(**settings), precision, GPU)
    assert str(error.value).partition("to need less: ")[2] == f"{remedies}, a smaller images.resolution"


def remedied(config: PersonalizeConfig, remedy: str) -> PersonalizeConfig:
    """With a remedy as messages name it."""
    if remedy == "a smaller images.resolution":
        return replace(config, images=replace(config.images, resolution=config.images.resolution // 2))
    changes: dict[str, dict[str, object]] = {}
    for setting in remedy.removesuffix(" and more training.accumulation").split(" and "):
        name, value = setting.split()
        *group, name = name.split(".")
        value = {"true": True, "false": False, "null": None}.get(value, int(value) if value.isdigit() else value)
        changes.setdefault(group[0] if group else "", {})[name] = value
    groups = {group: replace(getattr(config, group), **of_group) for group, of_group in changes.items() if group}
    return replace(config, **groups, **changes.get("", {}))


ONLY = {  # what is there at some moments alone
    "gradients": ("step",),
    "activations": ("step",),
    "swapped": ("look", "judging"),
    "encoding": ("encoding",),
    "denoising": ("look",),
    "decoding": ("look",),
}


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        (  # looks of so many pictures that the UNet takes more than the autoencoder
            {"images": UNCACHED, "training": TrainingConfig(batch_size=8), "watch": WatchConfig(batch_size=16)},
            "float32",
        ),
        ({"method": "full", "train_text_encoder": True, "training": TrainingConfig(ema_rate=0.9)}, "bf16"),
        ({"method": "full", "watch": WatchConfig(guidance_scale=1.0)}, "float32"),
    ],
    ids=["lora", "full", "full-float32"],
)
def test_what_is_suggested_helps(gpu, fresh_base, settings, precision):
    """Each setting lowers the very moment that does not fit."""
    gpu(fast=True)
    base = fresh_base("sd")
    config = PersonalizeConfig(**{"images": LARGE, **settings})

    @functools.cache
    def after(remedy: str) -> MemoryEstimate:
        name, _, value = remedy.partition(" ")
        if name == "watch.clip":  # which the judges alone depend on
            return replace(before, judges=0)
        changed = config if name == "training.precision" else remedied(config, remedy)
        arithmetic = value if name == "training.precision" else precision
        return estimate_memory(base, changed, arithmetic, judges=1000)

    before = estimate_memory(base, config, precision, judges=1000)
    for moment in memory.MOMENTS:  # of which this one alone is larger than what is there
        others = {name: 0 for name in ONLY if moment not in ONLY[name]}
        estimate = replace(before, **others)
        need = estimate.moments
        if need[moment] < max(need.values()):
            continue
        with pytest.raises(UserError) as error:
            require_memory(estimate, need[moment] - 1, config, precision, GPU)
        for remedy in str(error.value).partition("to need less: ")[2].split(", "):
            less = sum(after(remedy).parts(moment).values())
            assert less < sum(before.parts(moment).values()), (moment, remedy)


def test_latents_are_to_be_kept_where_encoding_takes_most(gpu, fresh_base):
    gpu(fast=True)
    base = fresh_base("sd")
    training = TrainingConfig(gradient_checkpointing=True)
    config = PersonalizeConfig(images=UNCACHED, training=training)
    accumulating = replace(config, training=replace(training, accumulation=2))
    assert not estimate_memory(base, accumulating, "bf16").encodes  # though gradients wait beside it
    levels = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    base.pipeline.vae = AutoencoderKL(3, 3, *levels, block_out_channels=(128, 128))
    for uncached in (config, accumulating):
        estimate = estimate_memory(base, uncached, "bf16")
        assert estimate.encodes
        with pytest.raises(UserError, match="images.cache true"):
            require_memory(estimate, 0, uncached, "bf16", GPU)
    assert estimate_memory(base, replace(accumulating, images=LARGE), "bf16").step < estimate.step
