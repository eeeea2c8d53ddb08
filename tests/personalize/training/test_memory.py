"""Estimates against PyTorch's own allocator, and its own autocast, and sums by hand."""

from __future__ import annotations

import contextlib
import functools
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from accelerate.state import AcceleratorState
from torch._subclasses import FakeTensorMode

from improved_diffusion.personalize.config import (
    AdapterConfig,
    ImagesConfig,
    PersonalizeConfig,
    PriorConfig,
    SubjectConfig,
    TrainingConfig,
)
from improved_diffusion.personalize.models.trained import prepare
from improved_diffusion.personalize.training.emulation import GPUArithmetic, LiveBytes
from improved_diffusion.personalize.training.memory import ALLOWANCE, estimate_memory

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "personalize_memory.py"
LARGE = ImagesConfig(resolution=64)  # at which activations count
FLOAT32 = TrainingConfig(steps=1, precision="float32")
CHECKPOINTING = TrainingConfig(steps=1, precision="float32", gradient_checkpointing=True)
WORD = SubjectConfig(token="<subject>", class_name="dog", vectors=2)


@pytest.fixture(scope="module")
def benchmark():
    return runpy.run_path(str(BENCHMARK))


@pytest.fixture
def measure(benchmark):
    """A step of the trainer, by what the allocator gives out."""
    AcceleratorState._reset_state(reset_partial_state=True)  # or the precision of another test would stay
    yield benchmark["measure"]
    AcceleratorState._reset_state(reset_partial_state=True)


SETTINGS = {
    "lora-batch": {"training": replace(FLOAT32, batch_size=2)},
    "lora-text-checkpointing-accumulation": {
        "training": replace(CHECKPOINTING, accumulation=2),
        "train_text_encoder": True,
    },
    "full-fused": {
        "method": "full",
        "training": replace(FLOAT32, optimizer="adafactor", fused_backward=True, grad_clip=None),
    },
    "full-ema-prior": {
        "method": "full",
        "training": replace(FLOAT32, ema_rate=0.99),
        "prior": PriorConfig(1, prompt="a dog"),
    },
    "inversion-checkpointing-no-cache": {
        "method": "textual_inversion",
        "training": CHECKPOINTING,
        "subject": WORD,
        "images": replace(LARGE, cache=False),
    },
}


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        *(("sd", settings) for settings in SETTINGS),
        *(("sdxl", settings) for settings in ("lora-text-checkpointing-accumulation", "full-ema-prior")),
    ],
    indirect=["base"],
)
def test_estimate_is_what_a_step_and_a_look_take(base, measure, settings):
    config = PersonalizeConfig(**{"images": LARGE, **SETTINGS[settings]})
    estimate = estimate_memory(base, config, "float32")
    said = tuple(size - estimate.allowance for size in (estimate.step, estimate.look - estimate.swapped))
    assert said == pytest.approx(measure(base, config), rel=0.05)


@pytest.mark.parametrize(
    ("kind", "unet", "text_encoders"),
    [("sd", 859_520_964, [123_060_480]), ("sdxl", 2_567_463_684, [123_060_480, 694_659_840])],
)
@pytest.mark.usefixtures("tiny_bases")  # skips where there is no vocabulary
def test_the_benchmark_has_the_published_architectures(benchmark, kind, unet, text_encoders):
    base = benchmark["published_base"](kind)
    parts = [base.unet, *base.text_encoders.values()]
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [unet, *text_encoders]


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch with CUDA, though no GPU")
@pytest.mark.parametrize(
    ("settings", "grad"),
    [
        ({"adapter": AdapterConfig(dropout=0.1, dora=True)}, True),
        ({"method": "full"}, True),
        ({"method": "full"}, False),
    ],
    ids=["dora", "full", "full, drawing"],
)
def test_arithmetic_is_that_of_autocast_on_a_gpu(base, settings, grad):
    """Fake tensors say that they are on a GPU, and PyTorch casts them as it would there."""
    base.to("meta", "bf16")
    prepare(base, PersonalizeConfig(**settings))
    with torch.set_grad_enabled(grad), LiveBytes() as emulated, GPUArithmetic(torch.bfloat16):
        forward(base, "meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        pretend_on_gpu(base.unet)
        with torch.set_grad_enabled(grad), LiveBytes() as live, GPUArithmetic(), autocast_on_gpu():
            forward(base, "cuda")
    assert emulated.peak == live.peak


def forward(base, device: str) -> torch.Tensor:
    unet, bf16 = base.unet, {"device": device, "dtype": torch.bfloat16}
    states = torch.empty(2, 77, unet.config.cross_attention_dim, **bf16)
    t, pooled = torch.empty(2, device=device), None
    if base.is_sdxl:
        width = base.pipeline.text_encoder_2.config.projection_dim
        pooled = {"text_embeds": torch.empty(2, width, **bf16), "time_ids": torch.empty(2, 6, device=device)}
    return unet(torch.empty(2, 4, 32, 32, **bf16), t, states, added_cond_kwargs=pooled)


def pretend_on_gpu(part: nn.Module) -> None:
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
            setattr(module, name, nn.Parameter(fake, parameter.requires_grad))


@contextlib.contextmanager
def autocast_on_gpu():
    """torch.autocast("cuda"), which would turn itself off where there is none."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def test_live_bytes():
    given = torch.zeros(1000)
    with LiveBytes() as live:
        given.view(10, 100).add_(1)  # makes nothing
        kept = given + 1
        passing = (kept * 2)[:10]  # a view keeps all of it
        assert live.now == 8000
        del passing
        torch.zeros(10)
    assert (live.now, live.peak) == (4000, 8000)


@pytest.mark.parametrize("base", ["sdxl"], indirect=True)  # of which both text encoders count
def test_every_type_has_its_bytes(base):
    """Adapters and whatever else is trained in float32, the rest as it is held."""
    encoders = base.text_encoders.values()
    unet, vae = (sum(p.numel() for p in part.parameters()) for part in (base.unet, base.pipeline.vae))
    text = sum(parameter.numel() for encoder in encoders for parameter in encoder.parameters())
    rest = 4 * vae + 2 * text + sum(buffer.nbytes for encoder in encoders for buffer in encoder.buffers())
    linear = sum(module.weight.numel() for module in base.unet.modules() if isinstance(module, nn.Linear))

    config = PersonalizeConfig(training=TrainingConfig(ema_rate=0.99))
    estimate = functools.partial(estimate_memory, base, precision="bf16", judges=1000)
    lora = estimate(config=config)
    adapters = lora.gradients // 4
    weights = 2 * unet + 4 * adapters
    assert lora.weights["unet"] == weights
    assert sum(lora.weights.values()) == weights + rest
    held = (lora.optimizer, lora.averages, lora.swapped, lora.judges, lora.allowance)
    assert held == (8 * adapters, 4 * adapters, 4 * adapters, 1000, ALLOWANCE)
    # Texts and latents are kept, and what made them waits on the CPU, as the judges do until there are pictures.
    assert lora.step == weights + 16 * adapters + lora.activations + ALLOWANCE
    assert lora.look == weights + rest + 16 * adapters + max(lora.denoising, lora.decoding) + ALLOWANCE
    assert sum(lora.parts("judging").values()) == weights + 16 * adapters + 1000 + ALLOWANCE
    assert sum(lora.parts("encoding").values()) == 4 * vae + lora.encoding + 1000 + ALLOWANCE
    full = estimate(config=replace(config, method="full"))
    assert (full.weights["unet"], full.gradients) == (4 * unet, 4 * unet)
    one_by_one = replace(config.watch, offload=True)
    other = estimate(config=replace(config, watch=one_by_one, images=ImagesConfig(cache=False)))
    assert other.look == max(weights + lora.denoising, 4 * vae + lora.decoding) + 16 * adapters + ALLOWANCE
    assert other.parts("step")["weights"] == weights + rest

    in_8_bits = replace(config, base_bits=8, training=replace(config.training, optimizer="adamw_8bit"))
    small = estimate(config=in_8_bits)
    assert (small.optimizer, small.weights["unet"]) == (2 * adapters, weights - linear)
    in_4_bits = estimate(config=replace(config, quantize="nf4")).weights["unet"]
    assert in_4_bits == pytest.approx(weights - (2 - 0.5625) * linear, abs=200)  # each layer is rounded


def test_the_base_is_left_as_it_is(base):
    before = {name: tensor.clone() for name, tensor in base.unet.state_dict().items()}
    random_state = torch.random.get_rng_state()
    words = [len(tokenizer) for tokenizer in base.tokenizers]
    estimate_memory(base, PersonalizeConfig(method="textual_inversion", subject=WORD), "bf16")
    assert [len(tokenizer) for tokenizer in base.tokenizers] == words
    assert all(parameter.requires_grad for parameter in base.unet.parameters())
    assert torch.equal(torch.random.get_rng_state(), random_state)
    torch.testing.assert_close(base.unet.state_dict(), before, rtol=0, atol=0)
