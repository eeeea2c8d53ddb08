"""Every setting of a cut-out's training: its type, its unit and its meaning, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from improved_diffusion.settings import require

# Equal in parameters: 3.45 M and 3.46 M.
WIDTHS = {"segformer": (32, 64, 160, 256), "unet": (16, 32, 64, 128, 204)}


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    kind: Literal["segformer", "unet"] = "segformer"
    """SegFormer (Xie et al. 2021) or a UNet."""
    checkpoint: str | None = None
    """SegFormer: a folder or a name on the Hugging Face hub to start from, which then says how large it is."""
    widths: tuple[int, ...] | None = None
    """Channels of each level; by default those of SegFormer-B0, and for a UNet as many parameters."""
    depths: tuple[int, ...] | None = None
    """Blocks of each level, by default 2; of a UNet on the way down, and as many on the way up."""
    heads: tuple[int, ...] = (1, 2, 5, 8)
    """SegFormer: heads of the attention of each level."""
    decoder_width: int = 128
    """SegFormer: channels in which its levels are joined. 256 in the paper, at half the speed."""
    patch_size: Literal[1, 2, 4] = 1
    """UNet: pixels a side of the patches that it sees as one pixel each: with 2, a quarter of the positions."""

    def __post_init__(self) -> None:
        widths, depths = self.level_widths, self.level_depths
        for name, values in (("widths", widths), ("depths", depths), ("heads", self.heads)):
            require(min(values, default=0) >= 1, f"model.{name} must be at least 1 each, not {values}")
        require(self.decoder_width >= 1, f"model.decoder_width must be at least 1, not {self.decoder_width}")
        require(
            self.checkpoint is None or self.kind == "segformer", "model.checkpoint is for model.kind segformer alone"
        )
        require(self.patch_size == 1 or self.kind == "unet", "model.patch_size is for model.kind unet alone")
        levels = 4 if self.kind == "segformer" else len(widths)
        require(
            len(widths) == len(depths) == levels and (self.kind == "unet" or len(self.heads) == levels),
            f"this network has {levels} levels: name as many model.widths, model.depths and, of SegFormer, model.heads",
        )

    @property
    def level_widths(self) -> tuple[int, ...]:
        """`widths`, or what is taken in their place."""
        return WIDTHS[self.kind] if self.widths is None else self.widths

    @property
    def level_depths(self) -> tuple[int, ...]:
        """`depths`, or what is taken in their place."""
        return (2,) * len(self.level_widths) if self.depths is None else self.depths

    @property
    def divisor(self) -> int:
        """What height and width of the network's input must be divisible by."""
        return 32 if self.kind == "segformer" else self.patch_size << (len(self.level_widths) - 1)


@dataclass(frozen=True)
class TrainingConfig:
    """The loop. The learning rate is that of train.py: see `training.optimization.learning_rate`."""

    steps: int = 20_000
    """Optimizer updates of the whole run."""
    batch_size: int = 8
    """Pictures of an update."""
    lr: float = 1e-3
    """Highest learning rate of AdamW."""
    lr_schedule: Literal["constant", "cosine", "wsd"] = "wsd"
    """wsd: constant, then falling linearly over the last `cooldown` of the steps."""
    cooldown: float = 0.3
    """Share of the steps."""
    warmup_steps: int = 300
    """Updates over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.01
    """Decoupled weight decay of AdamW."""
    grad_clip: float = 1.0
    """Largest allowed norm of the gradient."""
    ema_rate: float = 0.999
    """Rate of the moving average of the weights, which is what cuts out."""
    precision: Literal["float32", "bf16"] = "float32"
    """Arithmetic of the network in training; bf16 is faster where there is hardware for it, and slower elsewhere."""
    workers: int = 0
    """Processes that draw pictures; 0: the one that trains. The pictures are the same."""
    log_every: int = 50
    """Updates between lines of metrics.jsonl."""
    save_every: int = 500
    """Updates between checkpoints."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints to keep."""
    evaluate_every: int = 2_000
    """Updates between looks at held-out pictures."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every", "keep_checkpoints", "evaluate_every"):
            require(getattr(self, name) >= 1, f"training.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "grad_clip"):
            require(getattr(self, name) > 0, f"training.{name} must be positive, not {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "workers"):
            require(getattr(self, name) >= 0, f"training.{name} must not be negative, not {getattr(self, name)}")
        require(0 < self.cooldown <= 1, f"training.cooldown must be above 0 and at most 1, not {self.cooldown}")
        require(0 <= self.ema_rate < 1, f"training.ema_rate must be in [0, 1), not {self.ema_rate}")


@dataclass(frozen=True)
class SegmentConfig:
    """A run."""

    data: tuple[str, ...] = ()
    """Pictures with alpha: folders or zip files, each of one style."""
    backgrounds: tuple[str, ...] = ()
    """Photographs to lay some of them on: folders, zip files or packed sets; the other backgrounds are drawn."""
    held_out: float = 0.1
    """Share of the names that is kept from training, in all styles alike."""
    image_size: int = 128
    """Pixels a side of the pictures that it trains on."""
    seed: int = 0
    """Seed of the weights, the order of the pictures, and what is drawn of them."""
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        require(0 < self.held_out < 1, f"held_out must be between 0 and 1, not {self.held_out}")
        require(self.seed >= 0, f"seed must not be negative, not {self.seed}")
        require(
            self.image_size >= 1 and self.image_size % self.model.divisor == 0,
            f"image_size must be a multiple of {self.model.divisor} for this network, not {self.image_size}",
        )
