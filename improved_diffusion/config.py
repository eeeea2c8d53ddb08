"""Every setting of a pixel run: its type, its unit and its meaning, in one place.

A YAML file fills these dataclasses and command-line flags override it (`--training.lr 1e-4`): see settings.py.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from improved_diffusion.settings import require

PRETRAINED = "pretrained"  # names what ships with the project, in place of a run or a folder


@dataclass(frozen=True)
class ModelConfig:
    """What every kind of network has; `kind` says which it is."""

    image_size: int | tuple[int, int] = 64
    """Height and width of the images, in pixels: one number, or two."""
    channels: Literal[1, 3, 4] = 3
    """Of the images: grey, RGB or RGBA."""
    num_heads: int = 4
    """Attention heads."""
    dropout: float = 0.0
    """Dropout probability inside the blocks."""
    class_conditional: bool = True
    """Whether the network sees the class."""
    class_dropout: float = 0.0
    """Probability that training hides the class, so that sampling can use classifier-free guidance."""

    def __post_init__(self) -> None:
        require(min(self.sides) >= 1, f"model.image_size must be at least 1, not {self.image_size}")
        require(0 <= self.dropout < 1, f"model.dropout must be in [0, 1), not {self.dropout}")
        require(0 <= self.class_dropout < 1, f"model.class_dropout must be in [0, 1), not {self.class_dropout}")
        require(
            self.class_conditional or self.class_dropout == 0, "model.class_dropout needs model.class_conditional: true"
        )

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return (self.channels, *self.sides)


@dataclass(frozen=True)
class UNetConfig(ModelConfig):
    """The UNet."""

    kind: Literal["unet"] = "unet"
    """The kind of network."""
    patch_size: Literal[1, 2, 4] = 1
    """Pixels a side that become channels of one position: larger is faster, and wants prediction x_start."""
    num_channels: int = 128
    """Channels at the full resolution."""
    channel_multipliers: tuple[int, ...] = (1, 2, 3, 4)
    """Channels at each resolution, in units of num_channels; each entry after the first halves the feature map."""
    num_res_blocks: int = 2
    """Residual blocks at each resolution on the way down (one more on the way up)."""
    attention_resolutions: tuple[int, ...] = (16, 8)
    """Feature-map sizes, of the shorter side and in positions, at which there is self-attention."""

    def __post_init__(self) -> None:
        super().__post_init__()
        blocks = self.num_res_blocks
        require(1 <= blocks <= 100, f"model.num_res_blocks must be from 1 to 100, not {blocks}")
        require(len(self.channel_multipliers) >= 1, "model.channel_multipliers must not be empty")


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """The transformer."""

    kind: Literal["transformer"] = "transformer"
    """The kind of network."""
    patch_size: int = 4
    """Pixels a side of a patch."""
    width: int = 384
    """Channels of every token."""
    depth: int = 12
    """Blocks."""
    num_heads: int = 6
    """Attention heads."""
    num_context_tokens: int = 32
    """Tokens of the class that join the patches after a third of the blocks; 0 for none."""
    bottleneck: int | None = None
    """Channels of a narrow layer through which patches enter: worth it where they are large."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.depth <= 1000, f"model.depth must be from 1 to 1,000, not {self.depth}")


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process, and what the network predicts of it."""

    timesteps: int | None = 1000
    """T, the number of steps of the forward process; null for continuous time, which only the mse loss knows."""
    schedule: Literal["cosine", "linear", "flow", "ve"] = "cosine"
    """How signal turns into noise; flow (rectified) and ve (variance exploding, EDM's) are continuous in time."""
    prediction: Literal["eps", "x_start", "v", "velocity", "edm"] = "eps"
    """What the network's first channels, as many as an image has, predict."""
    loss_space: Literal["eps", "x_start", "v", "velocity", "edm"] | None = None
    """In what the mean-square error is taken; by default in what is predicted."""
    weighting: Literal["uniform", "min_snr", "soft_min_snr", "edm", "sigmoid"] = "uniform"
    """How much each noise level counts: alike in the loss space, or by a weight of the error in x_0."""
    variance: Literal["fixed_small", "fixed_large", "learned_range"] | None = None
    """Variance of the reverse process; by default fixed_large for the mse loss and learned_range for the others. With
    the mse loss, learned_range has the network's other channels but does not train them."""
    timestep_range: float = 1000
    """The network is told t * timestep_range / T, so that one embedding serves any T; in continuous time T is 1."""
    vlb_weight: float | None = None
    """Weight of a step's variational term (bits/dim) in the hybrid loss; by default T / 1000."""
    timestep_sampler: Literal["uniform", "stratified", "log_normal", "logit_normal", "loss_second_moment"] | None = None
    """Which t to train on; by default loss_second_moment for the vlb loss and uniform for the others."""

    def __post_init__(self) -> None:
        steps, most = self.timesteps, 1_000_000
        require(
            steps is None or 1 <= steps <= most, f"diffusion.timesteps must be from 1 to {most:,}, or null, not {steps}"
        )
        require(
            steps is None or self.schedule in ("cosine", "linear"),
            f"diffusion.schedule {self.schedule} is continuous in time: set diffusion.timesteps to null",
        )
        require(
            steps is None or self.prediction != "edm",
            "diffusion.prediction edm is for continuous time: set diffusion.timesteps to null",
        )
        require(
            self.prediction != "eps" or self.schedule != "flow",
            "diffusion.prediction eps says nothing of the image where a flow begins: predict velocity, v or x_start",
        )
        require(
            self.weighting == "uniform" or self.loss_space is None,
            f"diffusion.weighting {self.weighting} weighs the error of x_0, whatever the loss space: leave out "
            "diffusion.loss_space",
        )
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
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all weights, or Muon for the hidden matrices (of a UNet those of its attention and embeddings, not its
    convolutions) and AdamW for the others."""
    lr: float = 1e-4
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    eps: float = 1e-8
    """What AdamW adds to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay; 0 makes AdamW plain Adam."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    lr_schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """After that: constant, half a cosine down to 0, or constant with a linear cool-down to 0 at the end."""
    cooldown: float = 0.2
    """Share of the steps that wsd's cool-down takes."""
    grad_clip: float | None = 1.0
    """Largest allowed norm of the gradient; null for no clipping."""
    ema_rates: tuple[float, ...] = (0.9999,)
    """Rates of the moving averages of the weights; the first is the one that is sampled and evaluated. Until step
    9 / (1 - rate) an average forgets faster, so that it reaches back about a ninth of the steps taken: in a shorter run
    two such rates are one."""
    ema_lengths: tuple[float, ...] = ()
    """Relative lengths (sigma_rel of EDM2) of averages, such as 0.05 and 0.1, that are kept beside each checkpoint, so
    that the average of any length can be made of them after training."""
    lanes: int = 8
    """Shards that a batch is drawn from at once, where there are shards: best a multiple of the number of processes."""
    flip: bool = True
    """Mirror half of the images."""
    augment: float = 0.0
    """Probability of each of five transformations of an image, beside the mirroring of half; the network is told of
    them, so that they do not show in what it draws: for small data sets, such as 0.15."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Arithmetic of the network; auto is bf16 where the device has hardware for it. The run records which it was."""
    compile: bool = False
    """Compile forward process, network and loss with torch.compile: faster steps after a minute or two; with several
    processes the network alone. On a GPU evaluations draw by a compiled network too."""
    cuda_graph: bool = False
    """On one GPU, replay the forward and backward pass as a CUDA graph, so that no kernel waits for Python."""
    gradient_checkpointing: bool = False
    """Compute the network's blocks again in the backward pass: much less memory, more time, the same gradients."""
    shard_optimizer: bool = False
    """Divide the optimizer's moments and the moving averages among the processes, where they do not fit each."""
    log_every: int = 100
    """Steps between lines of metrics.jsonl."""
    save_every: int = 5000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep, beside the best one."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "save_every", "keep_checkpoints", "lanes"):
            require(getattr(self, name) >= 1, f"training.{name} must be at least 1, not {getattr(self, name)}")
        require(self.batch_size <= 1_000_000, f"training.batch_size must be at most 1,000,000, not {self.batch_size}")
        require(self.lr > 0, f"training.lr must be positive, not {self.lr}")
        for name in ("eps", "weight_decay", "warmup_steps"):
            require(getattr(self, name) >= 0, f"training.{name} must not be negative, not {getattr(self, name)}")
        clip = self.grad_clip
        require(clip is None or clip > 0, f"training.grad_clip must be positive or null, not {clip}")
        require(len(self.ema_rates) >= 1, "training.ema_rates needs at least one rate")
        for name in ("ema_rates", "ema_lengths"):
            different = len(set(getattr(self, name))) == len(getattr(self, name))
            require(different, f"training.{name} must differ from each other")
        for name in ("betas", "ema_rates"):
            for rate in getattr(self, name):
                require(0 <= rate < 1, f"training.{name} must be in [0, 1), not {rate}")
        for length in self.ema_lengths:
            require(0 < length < 0.28, f"training.ema_lengths must be between 0 and 0.28, not {length}")
        require(0 <= self.augment <= 1, f"training.augment must be between 0 and 1, not {self.augment}")
        require(0 < self.cooldown <= 1, f"training.cooldown must be above 0 and at most 1, not {self.cooldown}")
        require(
            self.batch_size % self.accumulation == 0,
            f"training.batch_size ({self.batch_size}) must be divisible by training.accumulation ({self.accumulation})",
        )


SAMPLER_OPTIONS: dict[str, tuple[str, ...]] = {
    "ancestral": (),
    "ddim": ("eta",),
    "heun": ("churn", "churn_min", "churn_max", "churn_noise"),
    "dpmpp_2m": ("eta",),
}


@dataclass(frozen=True)
class SamplingConfig:
    """How images are drawn, in evaluations and by sample.py."""

    sampler: Literal["ancestral", "ddim", "heun", "dpmpp_2m"] = "ancestral"
    """The sampler: ancestral (DDPM), ddim, heun (EDM; two evaluations a step) or dpmpp_2m (DPM-Solver++)."""
    steps: int | None = None
    """Sampling steps; by default the T of the forward process, or 50 in continuous time."""
    spacing: Literal["uniform", "karras", "log_snr"] | None = None
    """How the steps are spread over the noise levels; by default karras for heun and dpmpp_2m, else uniform in t."""
    options: dict[str, float] = field(default_factory=dict)
    """The sampler's own: eta of ddim and dpmpp_2m; churn, churn_min, churn_max, churn_noise of heun."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Noise levels, as sigma / signal, between which there is guidance; by default at all."""
    batch_size: int = 64
    """Images drawn at once: more is faster on a GPU and needs more memory; on a CPU at most 32 are."""
    noise: Literal["numpy", "philox"] = "numpy"
    """What draws the noise: numpy on the CPU, or the Philox generator on the device, which is faster on a GPU, slower
    on a CPU, and gives other images."""

    def __post_init__(self) -> None:
        require(self.steps is None or self.steps >= 1, f"sampling.steps must be at least 1, not {self.steps}")
        require(self.batch_size >= 1, f"sampling.batch_size must be at least 1, not {self.batch_size}")
        known = SAMPLER_OPTIONS[self.sampler]
        for name in self.options:
            has = f"it has {', '.join(known)}" if known else "it has none"
            require(name in known, f"sampling.options: {self.sampler} has no option {name}: {has}")
        eta = self.options.get("eta", 0.0)
        require(0 <= eta <= 1, f"sampling.options: eta must be between 0 and 1, not {eta}")
        for name, value in self.options.items():
            require(0 <= value < math.inf, f"sampling.options: {name} must be a number from 0 on, not {value}")
        low, high = self.guidance_interval or (0.0, 1.0)
        require(
            0 <= low < high,
            f"sampling.guidance_interval must be two increasing levels, none below 0, not {low} and {high}",
        )

    @property
    def chosen_spacing(self) -> str:
        """The spacing, with its default filled in."""
        return self.spacing or ("karras" if self.sampler in ("heun", "dpmpp_2m") else "uniform")


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
    """A run, of a UNet; see `TransformerRun` for the other kind."""

    loss: Literal["mse", "hybrid", "vlb"] = "hybrid"
    """The objective: mean-square error, mean-square error + vlb_weight * bound, or the bound alone."""
    data: str | None = None
    """The packed image set to train on, or a folder or URL of shards (see python -m improved_diffusion.data)."""
    seed: int = 0
    """Seed of the initial weights, the data order, the flips, the timesteps and the noise."""
    model: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        """Check what concerns the run or two settings at once, and fill in the defaults that depend on the loss."""
        require(self.seed >= 0, f"seed must not be negative, not {self.seed}")
        timesteps, diffusion, sampling = self.diffusion.timesteps, self.diffusion, self.sampling
        too_many = timesteps is not None and sampling.chosen_spacing == "uniform" and (sampling.steps or 0) > timesteps
        require(not too_many, f"sampling.steps ({sampling.steps}) must not exceed diffusion.timesteps ({timesteps})")
        require(
            self.sampling.guidance_scale == 1 or self.model.class_dropout > 0,
            f"sampling.guidance_scale {self.sampling.guidance_scale} needs a model with model.class_dropout > 0",
        )
        has_bound = self.loss != "mse"
        diffusion = dataclasses.replace(
            diffusion,
            variance=diffusion.variance or ("learned_range" if has_bound else "fixed_large"),
            vlb_weight=(timesteps or 0) / 1000 if diffusion.vlb_weight is None else diffusion.vlb_weight,
            timestep_sampler=diffusion.timestep_sampler or ("loss_second_moment" if self.loss == "vlb" else "uniform"),
        )
        require(
            timesteps is not None or not has_bound,
            f"the {self.loss} loss needs the steps of a bound: set diffusion.timesteps, or take the mse loss",
        )
        require(
            self.loss != "hybrid" or diffusion.variance == "learned_range",
            f"diffusion.variance {diffusion.variance} does not fit the hybrid loss, in which the bound trains only a "
            "variance: take learned_range",
        )
        require(
            self.loss != "hybrid" or bool(diffusion.vlb_weight),
            "diffusion.vlb_weight 0 leaves nothing of the bound that trains the variance: take the mse loss",
        )
        require(
            not has_bound or sampling.sampler != "heun",
            f"sampling.sampler heun has no use for the variance that the {self.loss} loss trains: take another, or mse",
        )
        require(
            self.loss != "vlb" or (diffusion.loss_space is None and diffusion.weighting == "uniform"),
            "the vlb loss has no mean-square error: leave out diffusion.loss_space and diffusion.weighting",
        )
        require(
            has_bound or diffusion.timestep_sampler != "loss_second_moment",
            "diffusion.timestep_sampler loss_second_moment learns from the bound, which the mse loss does not compute",
        )
        object.__setattr__(self, "diffusion", diffusion)
