"""From settings to a run: the accelerator, the budget, and everything put together."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import textwrap
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from improved_diffusion.personalize.config import PersonalizeConfig, WatchConfig
from improved_diffusion.personalize.data.captioned import CaptionedImage
from improved_diffusion.personalize.data.crops import buckets, choose_bucket
from improved_diffusion.personalize.data.encoded_files import EncodedFiles
from improved_diffusion.personalize.data.examples import Conditions, Examples
from improved_diffusion.personalize.data.learned import Captioned, Learned, open_images
from improved_diffusion.personalize.data.stream import stream_of
from improved_diffusion.personalize.data_config import LONGEST_TEXT
from improved_diffusion.personalize.measuring.judge import Judge
from improved_diffusion.personalize.measuring.references import see_training
from improved_diffusion.personalize.models.base import Base, load_base, load_tokenizer
from improved_diffusion.personalize.models.quantize import LIBRARIES as QUANTIZING
from improved_diffusion.personalize.models.quantize import quantize, require_library
from improved_diffusion.personalize.models.trained import needed_for_updates, prepare, require_token, resolution_of
from improved_diffusion.personalize.training.budget import plan, plan_looks, require_same_updates
from improved_diffusion.personalize.training.loop import PersonalizeLoop
from improved_diffusion.personalize.training.memory import estimate_memory, require_memory
from improved_diffusion.personalize.training.optimizers import LIBRARIES, rate_share
from improved_diffusion.personalize.training.prior import prior_images
from improved_diffusion.personalize.training.trainer import EncodedSet, Trainer
from improved_diffusion.personalize.training.watch import Watch, watched_prompts
from improved_diffusion.provenance import provenance_entry
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.runtime.devices import choose_precision, default_device
from improved_diffusion.settings import require, to_plain
from improved_diffusion.training.start import require_same_rates, require_steps_ahead

TRAINING_STATE = ("step", "model", "ema", "optimizer", "scaler", "images_seen", "prior_seen", "data_hash")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "pillow")

# What a resumed run may change; all else decides what the run computes.
CHANGEABLE = {
    "": ("data", "base", "variant", "wandb"),
    "training": ("steps", "epochs", "accumulation", "log_every", "save_every", "keep_checkpoints"),
    "watch": tuple(field.name for field in dataclasses.fields(WatchConfig)),
}


def with_precision(config: PersonalizeConfig, device: torch.device | None = None) -> tuple[PersonalizeConfig, str]:
    """The settings with `training.precision: auto` settled by the device, by default a GPU if there is one, so that the
    run records it and keeps it wherever it is resumed; and a line that says why."""
    device = device or default_device()
    if config.training.precision == "auto" and device.type == "cpu":
        precision, why = "float32", "float32, for there is no GPU"
    else:
        precision, why = choose_precision(config.training.precision, device)
    return dataclasses.replace(config, training=dataclasses.replace(config.training, precision=precision)), why


def require_place(out: Path, data: str | None) -> None:
    """A run lies beside its images: among them it would learn from its own samples.

    Raises:
        UserError: `out` is the folder `data`, or lies in it; or there is a file in its place.
    """
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    require(there.is_dir(), f"{there} is a file, and a run is a folder: choose another --out than {out}")
    if data is not None:
        images, run = Path(data).resolve(), out.resolve()
        require(
            images not in (run, *run.parents),
            f"{out} is among the images of {data}, and the run would learn from its own samples: choose another --out",
        )


def start_accelerator(config: PersonalizeConfig, cpu: bool = False) -> Accelerator:
    """Device, precision and processes, as `accelerate launch` or torchrun started them.

    Args:
        config: with its precision settled.
        cpu: use no GPU, even if there is one.

    Raises:
        UserError: what takes a CUDA device, without one.
        ModuleNotFoundError: a library that is not installed.
    """
    has_cuda = torch.cuda.is_available() and not cpu
    precision = config.training.precision
    needs_cuda = {
        "training.precision fp16": precision == "fp16",
        "watch.offload": config.watch.offload,
    }
    for setting, is_set in needs_cuda.items():
        require(has_cuda or not is_set, f"{setting} needs a CUDA device: leave it out here")
    for library in (LIBRARIES.get(config.training.optimizer), QUANTIZING.get(config.quantize)):
        if library is not None:
            require_library(library)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.training.tf32
    return Accelerator(
        cpu=not has_cuda,
        mixed_precision={"float32": "no"}.get(precision, precision),
        # The others wait while the first process draws the prior, or looks at the run.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )


def precision_of(accelerator: Accelerator) -> str:
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
    require(
        state is None or state["data_hash"] == learned.content_hash,
        f"{', '.join(part.data for part in config.parts)} does not hold the images and captions that {run.path} was "
        "trained on",
    )
    _say_what_was_found(learned, config, say)
    prompts, class_prompts = watched_prompts(config, learned)
    tokenizer = load_tokenizer(config.base)  # before the weights, which take long, are read
    require_token(config, [tokenizer])
    _say_what_is_cut(learned.training.texts, tokenizer, config.text.max_token_length, say)
    free = free_memory(accelerator.device)  # before anything of the run is there
    base = dataclasses.replace(load_base(config.base, config.variant), text=config.text)
    fingerprint = base.fingerprint()  # before it is cast
    timesteps = len(base.alphas_cumprod)
    require(
        max(config.watch.loss_timesteps) < timesteps,
        f"watch.loss_timesteps must be below {timesteps}, the timesteps of {config.base}",
    )
    resolution = resolution_of(config, base)
    sizes = buckets(resolution, config.images.buckets)
    of_images = choose_sizes(learned.training.images, sizes)
    _say_what_is_small(learned.training.images, of_images, say)
    stream = stream_of(of_images, learned.training.concepts, config)
    with_prior = [i for i, concept in enumerate(learned.training.concepts) if config.parts[concept].prior.images]
    budget = plan(stream, config.training, accelerator.num_processes, frozenset(with_prior))
    if state is not None:
        require_steps_ahead(budget.total.updates, state["step"])
        before = run.read_config(PersonalizeConfig).training
        planned = plan(stream, before, accelerator.num_processes, frozenset(with_prior))
        require_same_rates(
            lambda step: before.lr * rate_share(before, step, planned.total.updates),
            lambda step: config.training.lr * rate_share(config.training, step, budget.total.updates),
            state["step"],
        )
        require_same_updates(stream, budget, state["step"], state["images_seen"])
    say(f"budget: {budget}")
    drawn = len(prompts) + len(class_prompts)
    looks = plan_looks(config, budget.total, drawn, len(learned.held_out.images))
    say(f"looks: {looks}")
    judge = None
    if accelerator.is_main_process and looks.every is not None:
        judge = Judge(config.watch.clip, config.watch.vision, accelerator.device, "watch.")
        judge.rest()
    precision = precision_of(accelerator)
    estimate = estimate_memory(base, config, precision, judge.nbytes if judge is not None else 0)
    say(f"memory on a GPU, in {precision}:\n{textwrap.indent(str(estimate), '  ')}")
    if free is not None:
        require_memory(estimate, free, config, precision, accelerator.device)

    base.to("cpu", precision, config.training.vae_precision)
    if config.quantize is not None:
        quantize(base.unet, config.quantize)
    if config.training.vae_tiling:
        base.tile_vae()
    device, needed = accelerator.device, needed_for_updates(base, config)
    drawing = functools.partial(base.drawing, device, config.watch.offload, needed)
    priors = {}  # drawn by the base as it came
    for concept, part in enumerate(config.parts):
        if part.prior.images:
            own = {size for size, of in zip(of_images, learned.training.concepts, strict=True) if of == concept}
            priors[concept] = _prior(base, fingerprint, part, own, resolution, accelerator, drawing)
    trained = prepare(base, config)
    say(f"trained: {trained.count:,} numbers of {', '.join(trained.parts)}")
    base.place(device, "vae")
    source, held_out = _encode(base, learned.training, of_images, config, accelerator), None
    if learned.held_out.images:
        held_out = _encode(base, learned.held_out, choose_sizes(learned.held_out.images, sizes), config, accelerator)
    watch = None
    if judge is not None:
        with judge.at_work():
            references = see_training(base, judge, learned.training, config, resolution)
        folder = run.samples / "class_base"
        watch = Watch(base, config.watch, judge, references, prompts, class_prompts, resolution, folder, drawing)
        if state is not None:
            watch.keep_base()
    base.place(device, *base.text_encoders)
    of_priors = [encoded for sizes_of in priors.values() for encoded in sizes_of.values()]
    conditions = _conditions(base, config, accelerator, [source, held_out, *of_priors])
    base.place(device, *needed)
    trainer = Trainer(base, trained, config, source, priors, accelerator, conditions)
    if accelerator.is_main_process:
        _record_provenance(run, config, learned, accelerator)
    if state is not None:
        trainer.load_state_dict(state)
    wandb = _wandb(config, run, accelerator)
    return PersonalizeLoop(trainer, watch, held_out, budget, looks.every, run, config, learned.content_hash, wandb)


def _say_what_was_found(learned: Learned, config: PersonalizeConfig, say: Callable[[str], None]) -> None:
    for line in learned.skipped:
        say(f"skipped {line}")
    for concept, part in enumerate(config.parts):
        token, texts = part.subject.token, learned.training.of(concept).texts
        if token is not None and (without := sum(token not in text for text in texts)):
            say(f"warning: {without} of {len(texts)} captions do not name the subject: write {token} into them")


def _say_what_is_cut(texts: Sequence[str], tokenizer: Any, room: int, say: Callable[[str], None]) -> None:
    lengths = [len(numbers) for numbers in tokenizer(list(texts), add_special_tokens=False).input_ids]
    if long := sum(length > room for length in lengths):
        advice = ": see text.max_token_length" if room < LONGEST_TEXT else ""
        say(
            f"warning: {long} of {len(texts)} texts are cut after {room} tokens, the longest has {max(lengths)}{advice}"
        )


def _say_what_is_small(
    images: Sequence[CaptionedImage], sizes: Sequence[tuple[int, int]], say: Callable[[str], None]
) -> None:
    pairs = zip(images, sizes, strict=True)
    small = [image.name for image, (height, width) in pairs if image.size[0] < width or image.size[1] < height]
    if small:
        say(f"warning: {len(small)} of {len(images)} images are smaller than they are trained at, {small[0]} for one")


def choose_sizes(images: Sequence[CaptionedImage], sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of each image, the (height, width) among `sizes` whose shape is nearest to its own."""
    return [choose_bucket(*image.size, sizes) for image in images]


def _encode(
    base: Base,
    found: Captioned,
    sizes: Sequence[tuple[int, int]],
    config: PersonalizeConfig,
    accelerator: Accelerator,
) -> EncodedSet:
    files = EncodedFiles(base.pipeline.vae, folder=config.images.cache_folder) if config.images.cache else None
    share = (accelerator.process_index, accelerator.num_processes)
    return EncodedSet(Examples(base, found.images, sizes, config.images, files, share), found.wordings, found.concepts)


def _conditions(
    base: Base, config: PersonalizeConfig, accelerator: Accelerator, sources: Sequence[EncodedSet | None]
) -> Conditions:
    """What encodes texts; where they are kept, with those of all `sources`, and the empty one of a caption dropped."""
    # Of adapted or learning text encoders no text is kept.
    files = None
    if config.images.cache and not config.trains_text:
        files = EncodedFiles(*base.text_encoders.values(), folder=config.images.cache_folder)
    conditions = Conditions(base, config.keeps_texts, files)
    texts = [text for source in sources if source is not None for wordings in source.wordings for text in wordings]
    if config.images.caption_dropout:
        texts.append("")
    with accelerator.autocast():
        conditions.encode(texts)
    return conditions


def _prior(
    base: Base,
    fingerprint: str,
    config: PersonalizeConfig,
    sizes: Collection[tuple[int, int]],
    resolution: int,
    accelerator: Accelerator,
    drawing: Callable[[], contextlib.AbstractContextManager],
) -> dict[tuple[int, int], EncodedSet]:
    """The prior of a concept at each of the `sizes`; the first process draws what is missing of it."""
    with accelerator.main_process_first(), drawing():
        found = prior_images(base, fingerprint, config, resolution)
    for line in found.skipped:
        accelerator.print(f"skipped of the prior {line}")
    base.place(accelerator.device, "vae")
    text = config.subject.fill(config.prior.prompt)
    drawn = Captioned(found.images, ((text,),) * len(found), (0,) * len(found))
    plain = dataclasses.replace(config, images=dataclasses.replace(config.images, crops=1, flip=False))
    return {size: _encode(base, drawn, [size] * len(found), plain, accelerator) for size in sizes}


def _record_provenance(
    run: RunDirectory, config: PersonalizeConfig, learned: Learned, accelerator: Accelerator
) -> None:
    paths = [part.data for part in config.parts]
    data = {
        "path": paths if config.concepts else config.data,
        "images": len(learned.training.images),
        "content_hash": learned.content_hash,
    }
    entry = provenance_entry(data, accelerator.device, accelerator.num_processes, PACKAGES)
    run.write_config(config, [*run.read_provenance(), entry])


def _wandb(config: PersonalizeConfig, run: RunDirectory, accelerator: Accelerator) -> Any:
    """A Weights & Biases run, the same one when resumed; None if the settings name no project."""
    if config.wandb is None or not accelerator.is_main_process:
        return None
    import wandb

    name = hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:16]
    return wandb.init(
        project=config.wandb, name=run.path.name, id=name, resume="allow", dir=run.path, config=to_plain(config)
    )
