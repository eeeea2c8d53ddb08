"""The settings of a sweep: which runs, and the grid that is drawn from each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from improved_diffusion.personalize.config import CLIP, DINO, is_seed
from improved_diffusion.personalize.measuring.prompts import SHORT
from improved_diffusion.settings import require

SCALES = ("unet_scales", "text_encoder_scales", "guidance_scales")


def combinations(axes: Mapping[str, Sequence[Any]], together: Sequence[str]) -> list[dict[str, Any]]:
    """All combinations of the values of `axes`, of which those named in `together` go in step."""
    groups = [[{name: value} for value in values] for name, values in axes.items() if name not in together]
    if together:
        rows = zip(*(axes[name] for name in together), strict=True)
        groups.append([dict(zip(together, row, strict=True)) for row in rows])
    merged = ({name: value for part in parts for name, value in part.items()} for parts in itertools.product(*groups))
    return [{name: values[name] for name in axes} for values in merged]


def require_equal_lengths(axes: Mapping[str, Any], together: Sequence[str], group: str) -> None:
    """Raise UserError where axes that go together are missing, alone, or have different numbers of values."""
    for name in together:
        require(name in axes, f"{group}.zip names {name}, which is not in the grid")
    require(len(together) != 1, f"{group}.zip names {' '.join(together)} alone: name what it goes with, too")
    lengths = {name: len(axes[name]) for name in together}
    said = ", ".join(f"{name} {length}" for name, length in lengths.items())
    require(len(set(lengths.values())) <= 1, f"{group}.zip: axes that go together need as many values each: {said}")


@dataclass(frozen=True)
class TrainGrid:
    """Runs to train first, one for each combination."""

    config: str | None = None
    """YAML file of a run, relative to the sweep's own; null where runs are there already."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Settings of a run, `subject.token` say, each with the values to try."""
    zip: tuple[str, ...] = ()
    """Of these, which go together: the first value of each, the second of each, and so on."""

    def __post_init__(self) -> None:
        require_equal_lengths(self.grid, self.zip, "train")

    def combinations(self) -> list[dict[str, Any]]:
        """The settings of each run."""
        return combinations(self.grid, self.zip)


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
    zip: tuple[Literal["unet_scales", "text_encoder_scales", "guidance_scales"], ...] = ()
    """Of these three, which go together: the first value of each, the second of each, and so on."""
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
            require(name in self.zip or len(set(values)) == len(values), f"draw.{name} names something twice")
        require_equal_lengths(vars(self), self.zip, "draw")
        points = self.points()
        require(len({tuple(point.values()) for point in points}) == len(points), "draw.zip: a point is there twice")
        require(all(is_seed(seed) for seed in self.seeds), "draw.seeds must be from 0 to 2^63 - 1")
        for name in ("steps", "batch_size"):
            require(getattr(self, name) >= 1, f"draw.{name} must be at least 1, not {getattr(self, name)}")

    def points(self) -> list[dict[str, float]]:
        """The scales of the UNet and the text encoders and the guidance of each point, in the order of the grid."""
        return combinations({name: getattr(self, name) for name in SCALES}, self.zip)


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
