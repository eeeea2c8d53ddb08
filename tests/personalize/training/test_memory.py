"""Estimates against PyTorch's own allocator, and its own autocast, and sums by hand."""

from __future__ import annotations

import contextlib
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from accelerate.state import AcceleratorState
from torch._subclasses import FakeTensorMode

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import (
    AdapterConfig,
    ImagesConfig,
    PersonalizeConfig,
    PriorConfig,
    SubjectConfig,
    TrainingConfig,
)
from improved_diffusion.personalize.models.trained import prepare
from improved_diffusion.personalize.training.memory import (
    ALLOWANCE,
    LiveBytes,
    MemoryEstimate,
    _GPUArithmetic,
    estimate_memory,
    require_memory,
)

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "personalize_memory.py"
LARGE = ImagesConfig(resolution=64)  # at which activations count
FLOAT32 = TrainingConfig(precision="float32")
CHECKPOINTING = TrainingConfig(precision="float32", gradient_checkpointing=True)
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


@pytest.mark.parametrize(
    "settings",
    [
        {"training": replace(FLOAT32, batch_size=2)},
        {"training": replace(CHECKPOINTING, accumulation=2), "train_text_encoder": True},
        {"method": "full", "training": replace(FLOAT32, ema_rate=0.99), "prior": PriorConfig(1, prompt="a dog")},
        {
            "method": "textual_inversion",
            "training": CHECKPOINTING,
            "subject": WORD,
            "images": replace(LARGE, cache=False),
        },
    ],
    ids=["lora-batch", "lora-text-checkpointing-accumulation", "full-ema-prior", "inversion-checkpointing-no-cache"],
)
def test_estimate_is_what_a_step_takes(base, measure, settings):
    config = PersonalizeConfig(**{"images": LARGE, **settings})
    estimate = estimate_memory(base, config)
    assert estimate.total - estimate.allowance == pytest.approx(measure(base, config), rel=0.05)


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
    "settings", [{"adapter": AdapterConfig(dropout=0.1, dora=True)}, {"method": "full"}], ids=["dora", "full"]
)
def test_arithmetic_is_that_of_autocast_on_a_gpu(base, settings):
    """Fake tensors say that they are on a GPU, and PyTorch casts them as it would there."""
    base.to("meta", "bf16")
    prepare(base, PersonalizeConfig(**settings))
    with LiveBytes() as emulated, _GPUArithmetic(torch.bfloat16):
        forward(base, "meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        pretend_on_gpu(base.unet)
        with LiveBytes() as live, _GPUArithmetic(), autocast_on_gpu():
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


def test_every_type_has_its_bytes(base):
    """Adapters and whatever else is trained in float32, the rest as it is held."""
    encoders = base.text_encoders.values()
    unet, vae = (sum(p.numel() for p in part.parameters()) for part in (base.unet, base.pipeline.vae))
    text = sum(parameter.numel() for encoder in encoders for parameter in encoder.parameters())
    rest = 4 * vae + 2 * text + sum(buffer.nbytes for encoder in encoders for buffer in encoder.buffers())
    linear = sum(module.weight.numel() for module in base.unet.modules() if isinstance(module, nn.Linear))

    config = PersonalizeConfig(training=TrainingConfig(precision="bf16", ema_rate=0.99))
    lora = estimate_memory(base, config)
    adapters = lora.gradients // 4
    assert lora.weights == 2 * unet + 4 * adapters + rest
    assert (lora.optimizer, lora.averages, lora.allowance) == (8 * adapters, 4 * adapters, ALLOWANCE)
    full = estimate_memory(base, replace(config, method="full"))
    assert (full.weights, full.gradients) == (4 * unet + rest, 4 * unet)

    in_8_bits = replace(config, base_bits=8, training=replace(config.training, adam_8bit=True))
    small = estimate_memory(base, in_8_bits)
    assert (small.optimizer, small.weights) == (2 * adapters, lora.weights - linear)
    in_4_bits = estimate_memory(base, replace(config, base_bits=4))
    assert in_4_bits.weights == pytest.approx(lora.weights - (2 - 0.5625) * linear, abs=200)  # each layer is rounded


def test_the_base_is_left_as_it_is(base):
    before = {name: tensor.clone() for name, tensor in base.unet.state_dict().items()}
    random_state = torch.random.get_rng_state()
    words = [len(tokenizer) for tokenizer in base.tokenizers]
    estimate_memory(base, PersonalizeConfig(method="textual_inversion", subject=WORD))
    assert [len(tokenizer) for tokenizer in base.tokenizers] == words
    assert all(parameter.requires_grad for parameter in base.unet.parameters())
    assert torch.equal(torch.random.get_rng_state(), random_state)
    torch.testing.assert_close(base.unet.state_dict(), before, rtol=0, atol=0)


def test_a_run_that_does_not_fit_is_told_what_would_need_less():
    estimate = MemoryEstimate(int(12.2e9), int(10.3e9), int(20.5e9), 0, 280_000_000)
    assert str(estimate) == (
        "weights 12.2 GB + gradients 10.3 GB + optimizer 20.5 GB + activations 280 MB + allowance 500 MB = 43.8 GB"
    )
    config = PersonalizeConfig(method="full", training=TrainingConfig(gradient_checkpointing=True, precision="bf16"))
    require_memory(estimate, int(80e9), config, "cuda:0")
    with pytest.raises(UserError) as error:
        require_memory(estimate, int(11.8e9), config, "cuda:0")
    assert str(error.value) == (
        "training needs about 43.8 GB and cuda:0 has 11.8 GB free; to need less: training.adam_8bit true, method lora, "
        "a smaller images.resolution"
    )


@pytest.mark.parametrize(
    ("settings", "remedies"),
    [
        ({"base_bits": 4, "training": CHECKPOINTING}, "training.precision bf16, a smaller images.resolution"),
        (
            {"training": TrainingConfig(batch_size=2, ema_rate=0.9), "images": ImagesConfig(cache=False)},
            "training.gradient_checkpointing true, training.batch_size 1 and more training.accumulation, "
            "images.cache true, base_bits 4, a smaller images.resolution",
        ),
        (
            {"method": "full", "train_text_encoder": True, "training": replace(CHECKPOINTING, ema_rate=0.9)},
            "training.precision bf16, training.adam_8bit true, training.ema_rate null, train_text_encoder false, "
            "method lora, a smaller images.resolution",
        ),
    ],
)
def test_only_what_is_not_yet_set_is_suggested(settings, remedies):
    with pytest.raises(UserError) as error:
        require_memory(MemoryEstimate(1, 0, 0, 0, 0), 0, PersonalizeConfig(**settings), "cuda:0")
    assert str(error.value).partition("to need less: ")[2] == remedies
