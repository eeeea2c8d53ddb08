"""The settings of a sweep: which runs, and the grid that is drawn from each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from improved_diffusion.personalize.config import CLIP, DINO, is_seed
from improved_diffusion.personalize.measuring.prompts import SHORT
from improved_diffusion.settings import require


@dataclass(frozen=True)
class TrainGrid:
    """Runs to train first, one for each combination."""

    config: str | None = None
    """YAML file of a run, relative to the sweep's own; null where runs are there already."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Settings of a run, `subject.token` say, each with the values to try."""


@dataclass(frozen=True)
class DrawGrid:
    """What is drawn from each run: every combination, each with every prompt and seed."""

    prompts: tuple[str, ...] = SHORT
    """Texts; {token} and {class} stand for the run's subject."""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """A picture is drawn from each."""
    checkpoints: tuple[str, ...] = ("best",)
    """best, latest, or the names of files."""
    unet_scales: tuple[float, ...] = (1.0,)
    """Weights of the UNet's adapter."""
    text_encoder_scales: tuple[float, ...] = (1.0,)
    """Weights of the text encoders' adapters."""
    guidance_scales: tuple[float, ...] = (7.5,)
    """Classifier-free guidance."""
    steps: int = 30
    """Sampling steps."""
    negative_prompt: str = ""
    """What the pictures should not be."""
    batch_size: int = 4
    """Pictures drawn at once."""

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds", "checkpoints", "unet_scales", "text_encoder_scales", "guidance_scales"):
            values = getattr(self, name)
            require(len(values) > 0, f"draw.{name} must not be empty")
            require(len(set(values)) == len(values), f"draw.{name} names something twice")
        require(all(is_seed(seed) for seed in self.seeds), "draw.seeds must be from 0 to 2^63 - 1")
        for name in ("steps", "batch_size"):
            require(getattr(self, name) >= 1, f"draw.{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class SweepConfig:
    """A sweep."""

    runs: tuple[str, ...] = ()
    """Directories of runs; or train them, see `train`."""
    base: str | None = None
    """Where the base of the runs is now; by default where they had it."""
    data: str | None = None
    """Where the training images of the runs are now; by default where they had them."""
    clip: str | None = CLIP
    """CLIP model, by name or folder, that scores prompts; null for none."""
    vision: str | None = DINO
    """What scores likeness: DINO or DINOv2, by name or folder; `inception`, which needs no download; or null."""
    train: TrainGrid = field(default_factory=TrainGrid)
    draw: DrawGrid = field(default_factory=DrawGrid)

    def __post_init__(self) -> None:
        require(
            bool(self.runs) != (self.train.config is not None),
            "a sweep draws from runs that are there (runs), or trains them (train.config): give one of the two",
        )
        require(len(set(self.runs)) == len(self.runs), "runs names something twice")
