"""What the parts of gpu.py have in common."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from improved_diffusion.config import Config
from improved_diffusion.data.image_set import ImageSet

Row = dict[str, Any]


class Case(NamedTuple):
    """One line of the report."""

    name: str
    run: Callable[[], Row]


def random_images(count: int, size: int, classes: int) -> ImageSet:
    """A set in memory, whose images are noise."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    names = tuple(f"class{label}" for label in range(classes))
    return ImageSet(images, np.arange(count) % classes, names, Path("random"), "train", "random")


def with_training(config: Config, **changes: Any) -> Config:
    """`config` with other settings of the training."""
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object], device: torch.device, at_least: float) -> float:
    """Seconds of a call, the mean over so many that they take `at_least` seconds; after one that does not count."""
    function()
    synchronize(device)
    start, calls = time.perf_counter(), 0
    while True:
        function()
        calls += 1
        if device.type != "cuda" or calls % 5 == 0:
            synchronize(device)
            if (elapsed := time.perf_counter() - start) >= at_least:
                return elapsed / calls


def reset_memory(device: torch.device) -> None:
    """Begin to watch how much memory is taken."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def memory(device: torch.device) -> Row:
    """The most memory that was taken since `reset_memory`."""
    return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if device.type == "cuda" else {}
