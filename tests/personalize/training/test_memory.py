"""Estimates against PyTorch's own allocator on the CPU, its own autocast, and sums by hand."""

from __future__ import annotations

import copy
import dataclasses
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

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
from improved_diffusion.personalize.training import memory
from improved_diffusion.personalize.training.memory import LiveBytes, MemoryEstimate, estimate_memory, require_memory

ROOT = Path(__file__).parents[3]
LARGE = ImagesConfig(resolution=64)  # so that activations count
CHECKPOINTED = TrainingConfig(precision="float32", gradient_checkpointing=True)
FLOAT32 = TrainingConfig(precision="float32")


@pytest.fixture(scope="module")
def measure():
    """The measurement of the benchmark: a step of the real trainer, by the allocator."""
    return runpy.run_path(str(ROOT / "benchmarks" / "personalize_memory.py"))["measure"]


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "lora", "training": FLOAT32},
        {"method": "lora", "training": CHECKPOINTED, "train_text_encoder": True},
        {"method": "lora", "training": dataclasses.replace(FLOAT32, batch_size=2), "adapter": AdapterConfig(dora=True)},
        {"method": "full", "training": dataclasses.replace(FLOAT32, ema_rate=0.99)},
        {"method": "full", "training": dataclasses.replace(CHECKPOINTED, accumulation=2), "train_text_encoder": True},
        {
            "method": "full",
            "training": FLOAT32,
            "subject": SubjectConfig(class_name="dog"),
            "prior": PriorConfig(images=2),
        },
        {
            "method": "textual_inversion",
            "training": CHECKPOINTED,
            "subject": SubjectConfig(token="<subject>", class_name="dog", vectors=2),
        },
        {"method": "lora", "training": CHECKPOINTED, "images": dataclasses.replace(LARGE, cache=False)},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_the_estimate_is_what_a_step_takes(base, measure, settings):
    config = PersonalizeConfig(**{"images": LARGE, **settings})
    estimate = estimate_memory(base, config)
    measured = measure(base, config)
    print(estimate.total - estimate.allowance, measured, (estimate.total - estimate.allowance) / measured,)
    assert estimate.total - estimate.allowance == pytest.approx(measured, rel=0.04)
