"""What several benchmarks train: the UNet of Food101, of any width, on random images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from improved_diffusion.config import Config
from improved_diffusion.config_file import load_config
from improved_diffusion.data.image_set import ImageSet
from improved_diffusion.runtime.devices import Processes
from improved_diffusion.settings import settings_of, to_plain
from improved_diffusion.training.trainer import Trainer

BASE = Path(__file__).parents[1] / "configs" / "food101_hybrid.yaml"
CLASSES = 101
ALONE = Processes(torch.device("cpu"))


def random_run(num_channels: int, batch_size: int, **training: Any) -> Config:
    """The settings of Food101, of another width, in float32."""
    plain = to_plain(load_config(BASE))
    plain["model"]["num_channels"] = num_channels
    plain["training"] |= {"batch_size": batch_size, "precision": "float32", **training}
    return settings_of(Config, plain, str(BASE))


def make_trainer(config: Config, processes: Processes = ALONE) -> Trainer:
    rng = np.random.default_rng(0)
    height, width = config.model.sides
    n = config.training.batch_size
    images = rng.integers(0, 256, (n, height, width, config.model.channels), dtype=np.uint8)
    names = tuple(map(str, range(CLASSES)))
    image_set = ImageSet(images, rng.integers(0, CLASSES, n), names, Path("random"), "all", "")
    return Trainer(config, image_set, processes)
