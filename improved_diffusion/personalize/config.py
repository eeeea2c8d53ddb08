"""Every setting of a personalization run: its type, its unit and its meaning, in one place.

A YAML file fills these dataclasses and command-line flags override it (`--training.lr 1e-4`): see settings.py.
In prompts, `{token}` and `{class}` stand for the subject's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from improved_diffusion.errors import UserError
from improved_diffusion.settings import require

# Models that judge pictures, unless others are named.
CLIP = "openai/clip-vit-large-patch14"
DINO = "facebook/dino-vits16"

LEAST_FACTOR = 0.1  # of Prodigy's own learning rate
FUSABLE = ("adamw", "adafactor", "lion")  # in which no parameter asks for another's gradient
FILLED = ("token", "class")  # what stands in braces in a prompt


def is_seed(number: int) -> bool:
    """Whether PyTorch's generators take it."""
    return 0 <= number < 2**63


@dataclass(frozen=True)
class ImagesConfig:
    """How the images to learn from are treated."""

    captions: bool = True
    """Use the captions that come with the images; an image without one gets the subject's prompt."""
    caption_column: str | None = None
    """Column of the captions in metadata or parquet; by default a usual name is looked for."""
    background: str = "white"
    """Colour under transparent images: a name or #rrggbb."""
    resolution: int | None = None
    """Pixels a side (with buckets: of a square of equal area); by default what the base was made for."""
    buckets: bool = False
    """Train at sizes of several aspect ratios instead of squares alone."""
    crops: int = 1
    """Crops of each image, evenly along its longer side; 1 is the centre."""
    flip: bool = False
    """Each crop mirrored as well."""
    repeats: int = 1
    """Times that each image is seen in an epoch."""
    held_out: int = 0
    """Images kept from training, to measure the loss on."""
    caption_dropout: float = 0.0
    """Probability that an image is learned without its caption. 0.05 to 0.1 is usual."""
    shuffle_tags: bool = False
    """Bring what stands between the commas of a caption into another order at each sight."""
    keep_tags: int = 1
    """Of these, how many stay in front."""
    cache: bool = True
    """Keep latents and text embeddings, in memory and from run to run on disk, instead of encoding at every step."""

    def __post_init__(self) -> None:
        for name in ("crops", "repeats"):
            require(getattr(self, name) >= 1, f"images.{name} must be at least 1, not {getattr(self, name)}")
        require(
            0 <= self.caption_dropout <= 1,
            f"images.caption_dropout must be between 0 and 1, not {self.caption_dropout}",
        )
        require(self.keep_tags >= 0, f"images.keep_tags must not be negative, not {self.keep_tags}")
        require(self.held_out >= 0, f"images.held_out must not be negative, not {self.held_out}")
        require(
            self.resolution is None or (self.resolution >= 8 and self.resolution % 8 == 0),
            f"images.resolution must be a multiple of 8, not {self.resolution}",
        )


@dataclass(frozen=True)
class SubjectConfig:
    """What a prompt calls the subject (DreamBooth, textual inversion)."""

    token: str | None = None
    """The rare token; with textual inversion the new word."""
    class_name: str | None = None
    """What kind of thing it is: dog, sticker, ..."""
    prompt: str = "a photo of {token} {class}"
    """Text of the images that have no caption."""
    caption_prompt: str | None = None
    """Text of those that have one, which stands for {caption} in it, so that every caption names the subject:
    "{token} {class}, {caption}"; null for the caption as it is."""
    allow_split_token: bool = False
    """Take a token that a tokenizer splits, a name say, though its pieces have meanings of their own."""
    vectors: int = 1
    """Textual inversion: embeddings that the new word stands for."""

    def __post_init__(self) -> None:
        require(self.vectors >= 1, f"subject.vectors must be at least 1, not {self.vectors}")
        require(
            self.caption_prompt is None or "{caption}" in self.caption_prompt,
            f"subject.caption_prompt {self.caption_prompt!r} has no {{caption}} for the caption",
        )

    def fill(self, template: str) -> str:
        """The prompt, with the token and the class in their places.

        Raises:
            UserError: it asks for one that is not set, or for something else.
        """
        try:
            text = template.format_map(_Set({"token": self.token, "class": self.class_name}))
        except KeyError as error:
            known = "set subject.token and subject.class_name (a run has them)" if error.args[0] in FILLED else ""
            advice = known or "only {token} and {class} can be filled in"
            raise UserError(f"the prompt {template!r} needs {{{error.args[0]}}}: {advice}") from error
        except (ValueError, IndexError, AttributeError) as error:
            raise UserError(f"the prompt {template!r} cannot be filled in: {error}") from error
        return " ".join(text.split())


class _Set(dict):
    """Of which what is None is as good as missing."""

    def __getitem__(self, name: str) -> str:
        value = super().__getitem__(name)
        if value is None:
            raise KeyError(name)
        return value


@dataclass(frozen=True)
class PriorConfig:
    """Images of the class, which the base draws, trained on beside the subject so that the class is not forgotten."""

    images: int = 0
    """How many; 0 for none."""
    weight: float = 1.0
    """Of their loss."""
    prompt: str = "a photo of a {class}"
    """What they show."""
    path: str | None = None
    """Folder in which they are kept, or a folder of one's own images; by default one in the cache."""
    steps: int = 50
    """Sampling steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance."""

    def __post_init__(self) -> None:
        require(self.images >= 0, f"prior.images must not be negative, not {self.images}")
        require(self.weight >= 0, f"prior.weight must not be negative, not {self.weight}")
        require(self.steps >= 1, f"prior.steps must be at least 1, not {self.steps}")


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
    copy_cap: float = 0.2
    """Highest copy score of a checkpoint that may be chosen: 0 is as close to the training images as these are to each
    other, 1 is identical."""
    loss_timesteps: tuple[int, ...] = (100, 300, 500, 700, 900)
    """Timesteps at which the loss on held-out images is measured."""

    def __post_init__(self) -> None:
        for name in ("every", "steps", "batch_size"):
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
        if self.prior.images:
            self.subject.fill(self.prior.prompt)  # says what is missing

    @property
    def keeps_texts(self) -> bool:
        """Whether texts are encoded once, before the first update."""
        return self.images.cache and not self.trains_text and not self.images.shuffle_tags

    @property
    def trains_text(self) -> bool:
        """Whether anything that texts pass through is trained, so that their embeddings change."""
        return self.train_text_encoder or self.method == "textual_inversion"
