"""Every setting of a personalization run: its type, its unit and its meaning, in one place.

A YAML file fills these dataclasses and command-line flags override it (`--training.lr 1e-4`): see settings.py.
In prompts, `{token}` and `{class}` stand for the subject's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from improved_diffusion.personalize.data_config import (
    ConceptConfig,
    ImagesConfig,
    PriorConfig,
    SubjectConfig,
    TextConfig,
)
from improved_diffusion.settings import require

# Models that judge pictures, unless others are named.
CLIP = "openai/clip-vit-large-patch14"
DINO = "facebook/dino-vits16"

LEAST_FACTOR = 0.1  # of Prodigy's own learning rate
FUSABLE = ("adamw", "adafactor", "lion")  # in which no parameter asks for another's gradient


def is_seed(number: int) -> bool:
    """Whether PyTorch's generators take it."""
    return 0 <= number < 2**63


@dataclass(frozen=True)
class AdapterConfig:
    """What the adapters of LoRA look like."""

    rank: int = 8
    """Rank of the update of each matrix."""
    alpha: float = 8.0
    """The update is multiplied by alpha / rank."""
    targets: Literal["attention", "attention+feedforward", "kohya", "kohya+convolutions"] = "attention"
    """Layers that have one: attention, also with the UNet's feed-forward layers; those of kohya's scripts (attention,
    feed-forward layers and projections, and the MLP of text encoders), also with the UNet's residual blocks."""
    dropout: float = 0.0
    """Probability of dropping an input of the update, in training."""
    dora: bool = False
    """Learn the magnitude of each output apart from its direction (DoRA)."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"adapter.rank must be at least 1, not {self.rank}")
        require(self.alpha > 0, f"adapter.alpha must be positive, not {self.alpha}")
        require(0 <= self.dropout < 1, f"adapter.dropout must be in [0, 1), not {self.dropout}")


@dataclass(frozen=True)
class TrainingConfig:
    """The loop."""

    steps: int | None = None
    """Optimizer updates of the whole run; or give epochs."""
    epochs: float | None = None
    """Times that every image is seen, images.repeats times each; or give steps."""
    batch_size: int = 1
    """Images of a forward pass on each GPU; images of the prior come on top, as many."""
    accumulation: int = 1
    """Forward passes for each update."""
    lr: float = 1e-4
    """Learning rate of the UNet; with textual inversion, of the new embeddings."""
    lr_text_encoder: float = 5e-5
    """Learning rate of the text encoder."""
    lr_text_encoder_2: float | None = None
    """Learning rate of SDXL's second text encoder; by default that of the first."""
    warmup_steps: int = 0
    """Updates over which the learning rates rise linearly from 0."""
    lr_schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """After that: constant, half a cosine down to 0, or constant with a linear cool-down to 0 at the end."""
    cooldown: float = 0.2
    """Share of the updates that wsd's cool-down takes; 1 is a linear fall."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "lion", "prodigy"] = "adamw"
    """AdamW; with its state in 8 bits (bitsandbytes, on a GPU), or besides moved to the CPU when memory is short;
    Adafactor, with little state; Lion, which wants a third to a tenth of AdamW's rate; or Prodigy, which finds the
    rate itself: set lr to 1."""
    fused_backward: bool = False
    """Update each parameter in the backward pass, once its gradient is there, and drop that: there are never all
    gradients at once. Needs grad_clip null, accumulation 1, and AdamW, Adafactor or Lion."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    grad_clip: float | None = 1.0
    """Largest allowed norm of the gradient; null for no clipping."""
    adam_8bit: bool = False
    """The former name of `optimizer: adamw_8bit`."""
    precision: Literal["auto", "bf16", "fp16", "float32"] = "auto"
    """Arithmetic of the networks; auto is bf16 on a GPU that has hardware for it. What is trained stays float32."""
    vae_precision: Literal["bf16", "fp16", "float32"] = "float32"
    """Arithmetic of the autoencoder; that of SDXL overflows in fp16."""
    vae_tiling: bool = False
    """Let it work on large pictures in tiles of 512 pixels: less memory; latents and pictures differ a little."""
    tf32: bool = True
    """Let a GPU multiply float32 matrices in TF32."""
    min_snr_gamma: float | None = None
    """Gamma of the min-SNR weights of the loss; null for none. 5 is usual."""
    noise_offset: float = 0.0
    """Strength of a constant added to each channel's noise. 0.05 to 0.1 is usual."""
    ema_rate: float | None = None
    """Rate of the moving average of what is trained, which is then what is drawn from; null for none."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    log_every: int = 10
    """Updates between lines of metrics.jsonl."""
    save_every: int = 100
    """Updates between checkpoints; there is one at every look at the run as well."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints to keep, beside those that the choice of the best may fall on."""

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "batch_size", "accumulation", "log_every", "save_every", "keep_checkpoints"):
            value = getattr(self, name)
            least = 0 if name == "epochs" else 1
            require(
                value is None or value > 0 and value >= least,
                f"training.{name} must be {'positive' if name == 'epochs' else 'at least 1'}, not {value}",
            )
        for name in ("lr", "lr_text_encoder", "lr_text_encoder_2", "grad_clip", "min_snr_gamma"):
            value = getattr(self, name)
            require(value is None or value > 0, f"training.{name} must be positive, not {value}")
        require(0 < self.cooldown <= 1, f"training.cooldown must be above 0 and at most 1, not {self.cooldown}")
        if self.adam_8bit:
            object.__setattr__(self, "optimizer", "adamw_8bit")
        require(
            self.optimizer != "prodigy" or self.lr >= LEAST_FACTOR,
            f"prodigy finds the learning rate itself, and training.lr is a factor of it: set it to 1, not {self.lr:g}",
        )
        unfit = {
            "grad_clip null": self.grad_clip is not None,
            "accumulation 1": self.accumulation > 1,
            "optimizer adamw, adafactor or lion": self.optimizer not in FUSABLE,
            "precision bf16 or float32": self.precision == "fp16",
        }
        for setting, is_unfit in unfit.items():
            require(
                not (self.fused_backward and is_unfit),
                f"training.fused_backward never has the whole gradient: set training.{setting}",
            )
        for name in ("warmup_steps", "weight_decay", "noise_offset"):
            require(getattr(self, name) >= 0, f"training.{name} must not be negative, not {getattr(self, name)}")
        require(
            self.ema_rate is None or 0 <= self.ema_rate < 1, f"training.ema_rate must be in [0, 1), not {self.ema_rate}"
        )
        require(
            self.steps is None or self.epochs is None,
            "training.steps and training.epochs are both given: set one of them to null",
        )


@dataclass(frozen=True)
class WatchConfig:
    """Looks at the run: pictures of fixed prompts and seeds, and what is measured of them."""

    every: int | None = 100
    """Updates between looks; the first is before training, the last after it. null for no looks."""
    share: float = 0.15
    """Largest share of a run's arithmetic that looks may take. To keep to it they come at every second, third ...
    multiple of `every`, but the first and the last are always there. 1 sets no limit."""
    suite: Literal["short", "object", "live", "captions"] = "short"
    """Prompts: clothes, style, place and action; DreamBooth's 25 for objects or for animals; or captions of the set."""
    prompts: tuple[str, ...] = ()
    """Prompts of one's own, in place of the suite."""
    class_prompts: tuple[str, ...] = ("a photo of a {class}", "a {class} in the forest")
    """Prompts without the subject, for which tuned and base should draw the same; used where there is a class."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A picture of each prompt is drawn from each."""
    steps: int = 25
    """Sampling steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance."""
    unet_scale: float = 1.0
    """Weight of the UNet's adapter."""
    text_encoder_scale: float = 1.0
    """Weight of the text encoders' adapters."""
    batch_size: int = 1
    """Pictures drawn at once on a GPU; more are faster and take more memory."""
    offload: bool = False
    """Keep only the part that is at work on the GPU while pictures are drawn: slower, less memory."""
    clip: str | None = CLIP
    """CLIP model, by name or folder, that measures CLIP-T and CLIP-I; null for none."""
    vision: str | None = DINO
    """What measures likeness: DINO or DINOv2, by name or folder; `inception`, which needs no download; or null."""
    max_references: int | None = 100
    """Training images of each concept, at most, with which pictures are compared; null for all. Copies of others are
    not seen."""
    copy_cap: float = 0.2
    """Highest copy score of a checkpoint that may be chosen: 0 is as close to the training images as these are to each
    other, 1 is identical."""
    loss_timesteps: tuple[int, ...] = (100, 300, 500, 700, 900)
    """Timesteps at which the loss on held-out images is measured."""

    def __post_init__(self) -> None:
        for name in ("every", "steps", "batch_size", "max_references"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"watch.{name} must be at least 1, not {value}")
        require(0 < self.share <= 1, f"watch.share must be above 0 and at most 1, not {self.share}")
        require(len(self.seeds) >= 1, "watch.seeds must not be empty")
        require(len(set(self.seeds)) == len(self.seeds), "watch.seeds must differ from each other")
        require(all(is_seed(seed) for seed in self.seeds), "watch.seeds must be from 0 to 2^63 - 1")
        require(len(self.loss_timesteps) >= 1, "watch.loss_timesteps must not be empty")
        require(all(t >= 0 for t in self.loss_timesteps), "watch.loss_timesteps must not be negative")


@dataclass(frozen=True)
class PersonalizeConfig:
    """A run."""

    base: str | None = None
    """The base model: a folder that save_pretrained wrote, a single .safetensors file, or a name on the Hugging Face
    hub."""
    variant: str | None = None
    """Of the files with the base's weights, where there are several: fp16, say."""
    data: str | None = None
    """The images to learn from: a folder or a parquet file, with captions or without."""
    concepts: tuple[ConceptConfig, ...] = ()
    """Or several things to learn at once, each with images, a token and a class of its own."""
    quantize: Literal["nf4", "int8", "fp8"] | None = None
    """Hold the frozen UNet in few bits: NF4 (bitsandbytes), int8 or fp8 (torchao)."""
    base_bits: Literal[4, 8] | None = None
    """The former name of `quantize`: nf4 or int8."""
    method: Literal["lora", "full", "textual_inversion"] = "lora"
    """What is trained: adapters; all weights; or the embeddings of a new word. With a subject, DreamBooth."""
    train_text_encoder: bool = False
    """Whether the text encoders are trained too."""
    seed: int = 0
    """Seed of the adapters, the order of the images, the timesteps, the noise and the prior's images."""
    wandb: str | None = None
    """Project of Weights & Biases to which the run is logged too."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    text: TextConfig = field(default_factory=TextConfig)
    subject: SubjectConfig = field(default_factory=SubjectConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        require(is_seed(self.seed), f"seed must be from 0 to 2^63 - 1, not {self.seed}")
        require(
            self.method != "textual_inversion" or self.subject.token is not None,
            "textual inversion learns a new word: name it with subject.token",
        )
        require(
            self.method != "textual_inversion" or self.subject.class_name is not None,
            "textual inversion starts from the embedding of a word: name it with subject.class_name",
        )
        require(
            not (self.method == "textual_inversion" and self.train_text_encoder),
            "textual inversion trains embeddings alone: leave out train_text_encoder, or use the method lora or full",
        )
        if self.base_bits is not None:
            object.__setattr__(self, "quantize", {4: "nf4", 8: "int8"}[self.base_bits])
        require(
            self.quantize is None or self.method != "full",
            f"a base in {self.quantize} cannot be trained in full: use the method lora",
        )
        if self.concepts:
            own = {
                "data": self.data,
                "subject.token": self.subject.token,
                "subject.class_name": self.subject.class_name,
                "prior.path": self.prior.path,
                "images.conditioning_data_dir": self.images.conditioning_data_dir,
            }
            given = [name for name, value in own.items() if value is not None]
            require(not given, f"each of the concepts has its own {', '.join(given)}: set it to null beside them")
            require(self.method != "textual_inversion", "textual inversion learns one word: leave out concepts")
        elif self.prior.images:
            self.subject.fill(self.prior.prompt)  # says what is missing
        _ = self.parts  # says what is wrong with one of them

    @functools.cached_property
    def parts(self) -> tuple[PersonalizeConfig, ...]:
        """The settings of each concept, as if it were learned alone: of a run without `concepts` the run's own."""
        return tuple(self._part(concept) for concept in self.concepts) or (self,)

    def _part(self, concept: ConceptConfig) -> PersonalizeConfig:
        subject = {"token": concept.token, "class_name": concept.class_name, "prompt": concept.prompt}
        prior = {"prompt": concept.class_prompt, "images": concept.class_images, "path": concept.class_data_dir}
        images = {"repeats": concept.repeats, "conditioning_data_dir": concept.conditioning_data_dir}
        own = {"subject": subject, "prior": prior, "images": images}
        groups = {
            name: replace(getattr(self, name), **{key: value for key, value in values.items() if value is not None})
            for name, values in own.items()
        }
        return replace(self, data=concept.data, concepts=(), **groups)

    def prompts(self, templates: Sequence[str]) -> list[str]:
        """The prompts, filled in for each concept: of one several only where it asks for what concepts differ in.

        Raises:
            UserError: see `SubjectConfig.fill`.
        """
        filled = (dict.fromkeys(part.subject.fill(template) for part in self.parts) for template in templates)
        return [prompt for of_template in filled for prompt in of_template]

    @property
    def has_prior(self) -> bool:
        return any(part.prior.images > 0 for part in self.parts)

    @property
    def keeps_texts(self) -> bool:
        """Whether texts are encoded once, before the first update."""
        return self.images.cache and not self.trains_text and not self.images.shuffle_tags

    @property
    def trains_text(self) -> bool:
        """Whether anything that texts pass through is trained, so that their embeddings change."""
        return self.train_text_encoder or self.method == "textual_inversion"
