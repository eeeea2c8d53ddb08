"""From settings to a run: the data, the base, the budget, and everything put together."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from improved_diffusion.diffusion.noise import seeded_generator
from improved_diffusion.personalize.config import PersonalizeConfig, WatchConfig
from improved_diffusion.personalize.data.captioned import CaptionedImage, CaptionedSet, open_captioned_set
from improved_diffusion.personalize.data.crops import buckets, choose_bucket, fit
from improved_diffusion.personalize.data.examples import Examples
from improved_diffusion.personalize.data.stream import MicroBatchStream
from improved_diffusion.personalize.measuring.judge import Judge
from improved_diffusion.personalize.models.base import Base, load_base
from improved_diffusion.personalize.models.trained import prepare
from improved_diffusion.personalize.training.budget import plan
from improved_diffusion.personalize.training.loop import PersonalizeLoop
from improved_diffusion.personalize.training.memory import estimate_memory, require_memory
from improved_diffusion.personalize.training.prior import prior_images
from improved_diffusion.personalize.training.trainer import Source, Trainer
from improved_diffusion.personalize.training.watch import Watch, watched_prompts
from improved_diffusion.provenance import provenance_entry
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.settings import require, to_plain
from improved_diffusion.training.devices import is_fast_at_bf16

TRAINING_STATE = ("step", "model", "ema", "optimizer", "scaler", "images_seen", "prior_seen", "data_hash")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "pillow")
HELD_OUT = 300  # purpose of a generator, see trainer.py

# What a resumed run may change; all else decides what the run computes.
CHANGEABLE = {
    "": ("data", "base", "wandb"),
    "training": ("steps", "epochs", "log_every", "save_every", "keep_checkpoints"),
    "watch": tuple(field.name for field in dataclasses.fields(WatchConfig)),
}


@dataclass(frozen=True)
class Learned:
    """The images of a run, divided, each with the text that it is learned with."""

    training: tuple[CaptionedImage, ...]
    texts: tuple[str, ...]
    held_out: tuple[CaptionedImage, ...]
    held_out_texts: tuple[str, ...]
    skipped: tuple[str, ...]
    content_hash: str


def open_images(config: PersonalizeConfig) -> Learned:
    """The images that `config` names, with their texts.

    Raises:
        UserError: no images, a missing caption where there is no subject to name instead, or all of them held out.
    """
    require(config.data is not None, "which images? give --data, a folder or a parquet file")
    has_subject = config.subject.token is not None
    found = open_captioned_set(
        config.data,
        background=config.images.background,
        captions_required=not has_subject,
        caption_column=config.images.caption_column,
    )
    count = config.images.held_out
    require(count < len(found), f"images.held_out is {count}, and there are {len(found)} images in {config.data}")
    order = torch.randperm(len(found), generator=seeded_generator(config.seed, HELD_OUT)).tolist()
    held_out = set(order[:count])

    def text(image: CaptionedImage) -> str:
        if image.caption is not None and config.images.captions:
            return config.subject.fill(image.caption) if has_subject else image.caption
        return config.subject.fill(config.subject.prompt)

    divided = [
        tuple(image for i, image in enumerate(found.images) if (i in held_out) == is_held_out)
        for is_held_out in (False, True)
    ]
    texts = [tuple(text(image) for image in images) for images in divided]
    return Learned(divided[0], texts[0], divided[1], texts[1], found.skipped, _content_hash(found))


def _content_hash(found: CaptionedSet) -> str:
    digest = hashlib.sha256()
    for image in found.images:
        digest.update(hashlib.sha256(image.read()).digest())
        digest.update((image.caption or "").encode() + b"\0")
    return digest.hexdigest()


def start_accelerator(config: PersonalizeConfig) -> Accelerator:
    """Device, precision and processes, as `accelerate launch` or torchrun started them.

    Raises:
        UserError: what takes a CUDA device, without one.
    """
    has_cuda = torch.cuda.is_available()
    precision = config.training.precision
    needs_cuda = {
        "training.precision fp16": precision == "fp16",
        "training.adam_8bit": config.training.adam_8bit,
        f"base_bits {config.base_bits}": config.base_bits is not None,
    }
    for setting, is_set in needs_cuda.items():
        require(has_cuda or not is_set, f"{setting} needs a CUDA device: leave it out here")
    if precision == "auto":
        precision = "bf16" if has_cuda and is_fast_at_bf16(torch.device("cuda")) else "float32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.training.tf32
    return Accelerator(cpu=not has_cuda, mixed_precision={"float32": "no"}.get(precision, precision))


def arithmetic(accelerator: Accelerator) -> str:
    """The precision of the networks: float32, bf16 or fp16."""
    return {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)


def free_memory(device: torch.device) -> int | None:
    """Bytes free on a GPU; None for a CPU, whose memory can be swapped."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def build(
    config: PersonalizeConfig,
    run: RunDirectory,
    state: dict[str, Any] | None,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> PersonalizeLoop:
    """All that a run needs, ready for its first update, or to go on from `state`. Prints the budget on the way.

    Raises:
        UserError: anything that is wrong with the settings, the images, the base, or the state.
    """
    require(config.base is not None, "which base model? give --base, a folder or a name on the Hugging Face hub")
    learned = open_images(config)
    captions = [*learned.held_out_texts, *learned.texts]
    prompts, class_prompts = watched_prompts(config, captions)
    require(
        state is None or state["data_hash"] == learned.content_hash,
        f"{config.data} does not hold the images and captions that {run.path} was trained on",
    )
    for line in learned.skipped:
        say(f"skipped {line}")
    token = config.subject.token
    if token is not None and (without := sum(token not in text for text in learned.texts)):
        say(f"warning: {without} of {len(learned.texts)} captions do not name the subject: write {token} into them")
    device = accelerator.device
    free = free_memory(device)  # before anything of the run is there
    base = load_base(config.base, config.base_bits)
    resolution = config.images.resolution or base.resolution
    sizes = buckets(resolution, config.images.buckets)
    stream = MicroBatchStream(
        choose_sizes(learned.training, sizes), config.images.repeats, config.training.batch_size, config.seed
    )
    budget = plan(stream, config.training, accelerator.num_processes, with_prior=config.prior.images > 0)
    say(f"budget: {budget}")
    estimate = estimate_memory(base, config)
    say(f"memory: {estimate}, on a GPU")
    if free is not None:
        require_memory(estimate, free, config, str(device))
    judge = Judge(config.watch.clip, config.watch.vision, device, "watch.") if accelerator.is_main_process else None
    base.to(accelerator.device, arithmetic(accelerator), config.training.vae_precision)
    prior = _prior(base, config, stream.sizes, resolution, accelerator)
    trained = prepare(base, config)
    where = f"{arithmetic(accelerator)} on {accelerator.device}"
    say(f"trained: {trained.count:,} numbers of {', '.join(trained.parts)}; {where}")
    source = Source(Examples(base, learned.training, stream.sizes, config.images), learned.texts)
    trainer = Trainer(base, trained, config, source, prior, accelerator)
    if state is not None:
        trainer.load_state_dict(state)
    held_out = None
    if learned.held_out:
        of_held_out = choose_sizes(learned.held_out, sizes)
        held_out = Source(Examples(base, learned.held_out, of_held_out, config.images), learned.held_out_texts)
    watch = None
    if judge is not None:
        size = (resolution, resolution)
        references = [fit(image.load(config.images.background), size)[0] for image in learned.training]
        folder = run.samples / "class_base"
        watch = Watch(base, config.watch, judge, references, prompts, class_prompts, folder)
    data = {"path": str(config.data), "images": len(learned.training), "content_hash": learned.content_hash}
    if accelerator.is_main_process:
        entry = provenance_entry(data, accelerator.device, accelerator.num_processes, PACKAGES)
        run.write_config(config, [*run.read_provenance(), entry])
    return PersonalizeLoop(
        trainer, watch, held_out, budget, run, config, learned.content_hash, _wandb(config, run, accelerator)
    )


def choose_sizes(images: Sequence[CaptionedImage], sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of each image, the (height, width) among `sizes` whose shape is nearest to its own."""
    return [choose_bucket(*image.load().size, sizes) for image in images]


def _prior(
    base: Base,
    config: PersonalizeConfig,
    sizes: Sequence[tuple[int, int]],
    resolution: int,
    accelerator: Accelerator,
) -> dict[tuple[int, int], Source] | None:
    """The prior at each size that the images have; the first process draws what is missing of it."""
    if not config.prior.images:
        return None
    with accelerator.main_process_first():
        found = prior_images(base, config, resolution)
    texts = [config.subject.fill(config.prior.prompt)] * len(found)
    plain = dataclasses.replace(config.images, crops=1, flip=False)
    return {size: Source(Examples(base, found.images, [size] * len(found), plain), texts) for size in set(sizes)}


def _wandb(config: PersonalizeConfig, run: RunDirectory, accelerator: Accelerator) -> Any:
    """A Weights & Biases run, the same one when resumed; None if the settings name no project."""
    if config.wandb is None or not accelerator.is_main_process:
        return None
    import wandb

    name = hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:16]
    return wandb.init(
        project=config.wandb, name=run.path.name, id=name, resume="allow", dir=run.path, config=to_plain(config)
    )
