"""Every setting of a pixel run: its type, its unit and its meaning, in one place.

A YAML file fills these dataclasses and command-line flags override it (`--training.lr 1e-4`): see settings.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from improved_diffusion.settings import load_settings, require


@dataclass(frozen=True)
class ModelConfig:
    """The UNet."""

    image_size: int = 64
    """Height and width of the images, in pixels."""
    num_channels: int = 128
    """Channels at the full resolution."""
    channel_multipliers: tuple[int, ...] = (1, 2, 3, 4)
    """Channels at each resolution, in units of num_channels; each entry after the first halves the feature map."""
    num_res_blocks: int = 2
    """Residual blocks at each resolution on the way down (one more on the way up)."""
    attention_resolutions: tuple[int, ...] = (16, 8)
    """Feature-map sizes, in pixels, at which there is self-attention."""
    num_heads: int = 4
    """Attention heads."""
    dropout: float = 0.0
    """Dropout probability inside the residual blocks."""
    class_conditional: bool = True
    """Whether the network sees the class."""
    class_dropout: float = 0.0
    """Probability that training hides the class, so that sampling can use classifier-free guidance."""

    def __post_init__(self) -> None:
        require(self.image_size >= 1, f"model.image_size must be at least 1, not {self.image_size}")
        blocks = self.num_res_blocks
        require(1 <= blocks <= 100, f"model.num_res_blocks must be from 1 to 100, not {blocks}")
        require(len(self.channel_multipliers) >= 1, "model.channel_multipliers must not be empty")
        require(0 <= self.dropout < 1, f"model.dropout must be in [0, 1), not {self.dropout}")
        require(0 <= self.class_dropout < 1, f"model.class_dropout must be in [0, 1), not {self.class_dropout}")
        require(
            self.class_conditional or self.class_dropout == 0, "model.class_dropout needs model.class_conditional: true"
        )


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process, and what the network predicts of it."""

    timesteps: int = 1000
    """T, the number of steps of the forward process."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """The noise schedule."""
    prediction: Literal["eps", "x_start", "v"] = "eps"
    """What the network's first three channels predict."""
    variance: Literal["fixed_small", "fixed_large", "learned_range"] | None = None
    """Variance of the reverse process; by default fixed_large for the mse loss and learned_range for the others."""
    timestep_range: float = 1000
    """The network is told t * timestep_range / T, so that one embedding serves any T."""
    vlb_weight: float | None = None
    """Weight of a step's variational term (bits/dim) in the hybrid loss; by default T / 1000."""
    timestep_sampler: Literal["uniform", "stratified", "loss_second_moment"] | None = None
    """Which t to train on; by default loss_second_moment for the vlb loss and uniform for the others."""

    def __post_init__(self) -> None:
        most = 1_000_000
        require(1 <= self.timesteps <= most, f"diffusion.timesteps must be from 1 to {most:,}, not {self.timesteps}")
        require(self.timestep_range > 0, f"diffusion.timestep_range must be positive, not {self.timestep_range}")
        require(
            self.vlb_weight is None or self.vlb_weight >= 0,
            f"diffusion.vlb_weight must not be negative, not {self.vlb_weight}",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """The loop."""

    steps: int = 90_000
    """Optimizer steps of the whole run."""
    batch_size: int = 64
    """Images per optimizer step, over all processes and accumulated parts."""
    accumulation: int = 1
    """Parts into which each process splits its share of the batch, to need less memory."""
    lr: float = 1e-4
    """Learning rate of AdamW."""
    weight_decay: float = 0.0
    """Decoupled weight decay; 0 makes AdamW plain Adam."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    grad_clip: float | None = 1.0
    """Largest allowed norm of the gradient; null for no clipping."""
    ema_rates: tuple[float, ...] = (0.9999,)
    """Rates of the moving averages of the weights; the first is the one that is sampled and evaluated."""
    flip: bool = True
    """Mirror half of the images."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Arithmetic of the network; auto is bf16 where the device has hardware for it. The run records which it was."""
    compile: bool = False
    """Run the network through torch.compile: faster steps after a minute or two of compilation."""
    log_every: int = 100
    """Steps between lines of metrics.jsonl."""
    save_every: int = 5000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep, beside the best one."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "save_every", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"training.{name} must be at least 1, not {getattr(self, name)}")
        require(self.batch_size <= 1_000_000, f"training.batch_size must be at most 1,000,000, not {self.batch_size}")
        require(self.lr > 0, f"training.lr must be positive, not {self.lr}")
        require(self.weight_decay >= 0, f"training.weight_decay must not be negative, not {self.weight_decay}")
        require(self.warmup_steps >= 0, f"training.warmup_steps must not be negative, not {self.warmup_steps}")
        require(
            self.grad_clip is None or self.grad_clip > 0,
            f"training.grad_clip must be positive or null, not {self.grad_clip}",
        )
        require(len(self.ema_rates) >= 1, "training.ema_rates needs at least one rate")
        require(len(set(self.ema_rates)) == len(self.ema_rates), "training.ema_rates must differ from each other")
        for rate in self.ema_rates:
            require(0 <= rate < 1, f"training.ema_rates must be in [0, 1), not {rate}")
        require(
            self.batch_size % self.accumulation == 0,
            f"training.batch_size ({self.batch_size}) must be divisible by training.accumulation ({self.accumulation})",
        )


@dataclass(frozen=True)
class SamplingConfig:
    """How images are drawn, in evaluations and by sample.py."""

    sampler: Literal["ancestral", "ddim"] = "ancestral"
    """The sampler."""
    steps: int | None = None
    """Sampling steps, evenly spaced over the T of the forward process; by default all of them."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is none."""
    batch_size: int = 64
    """Images drawn at once: more is faster and needs more memory."""

    def __post_init__(self) -> None:
        require(self.steps is None or self.steps >= 1, f"sampling.steps must be at least 1, not {self.steps}")
        require(self.batch_size >= 1, f"sampling.batch_size must be at least 1, not {self.batch_size}")


@dataclass(frozen=True)
class EvaluationConfig:
    """The sample grid and the FID of the EMA model, while training."""

    every: int = 15_000
    """Steps between evaluations."""
    features: Literal[64, 192, 768, 2048] | None = 64
    """Size of the Inception features of the FID; null for grids alone."""
    weights: str | None = None
    """File of Inception weights; by default found as fid.py finds them."""
    samples_per_class: int = 20
    """Images generated for each class."""
    reference: str | None = None
    """What to compare with: val or test, a split in the training set's folder, or the path of a packed set; by default
    val, or else test, or else the training set."""
    grid_columns: int = 8
    """Images in each row of the grid, one row per class."""
    seed: int = 0
    """Seed of the generated images, the same at every evaluation."""

    def __post_init__(self) -> None:
        require(self.every >= 1, f"evaluation.every must be at least 1, not {self.every}")
        for name, most in {"samples_per_class": 1_000_000, "grid_columns": 1000}.items():
            value = getattr(self, name)
            require(1 <= value <= most, f"evaluation.{name} must be from 1 to {most:,}, not {value}")
        require(self.seed >= 0, f"evaluation.seed must not be negative, not {self.seed}")


@dataclass(frozen=True)
class Config:
    """A run."""

    loss: Literal["mse", "hybrid", "vlb"] = "hybrid"
    """The objective: mean-square error, mean-square error + vlb_weight * bound, or the bound alone."""
    data: str | None = None
    """The packed image set to train on (see python -m improved_diffusion.data)."""
    seed: int = 0
    """Seed of the initial weights, the data order, the flips, the timesteps and the noise."""
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        """Check what concerns the run or two settings at once, and fill in the defaults that depend on the loss."""
        require(self.seed >= 0, f"seed must not be negative, not {self.seed}")
        timesteps, diffusion = self.diffusion.timesteps, self.diffusion
        require(
            self.sampling.steps is None or self.sampling.steps <= timesteps,
            f"sampling.steps ({self.sampling.steps}) must not exceed diffusion.timesteps ({timesteps})",
        )
        require(
            self.sampling.guidance_scale == 1 or self.model.class_dropout > 0,
            f"sampling.guidance_scale {self.sampling.guidance_scale} needs a model with model.class_dropout > 0",
        )
        learned = self.loss != "mse"
        diffusion = dataclasses.replace(
            diffusion,
            variance=diffusion.variance or ("learned_range" if learned else "fixed_large"),
            vlb_weight=timesteps / 1000 if diffusion.vlb_weight is None else diffusion.vlb_weight,
            timestep_sampler=diffusion.timestep_sampler or ("loss_second_moment" if self.loss == "vlb" else "uniform"),
        )
        require(
            learned == (diffusion.variance == "learned_range"),
            f"diffusion.variance {diffusion.variance} does not fit the {self.loss} loss: "
            "mse trains no variance, hybrid and vlb train learned_range",
        )
        require(
            learned or diffusion.timestep_sampler != "loss_second_moment",
            "diffusion.timestep_sampler loss_second_moment learns from the bound, which the mse loss does not compute",
        )
        object.__setattr__(self, "diffusion", diffusion)


def load_config(path: Path | str) -> Config:
    """The configuration in a YAML file. Raises UserError as `load_settings` does."""
    return load_settings(Config, path)
