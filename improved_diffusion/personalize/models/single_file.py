"""Bases in a single file, as they go around: all weights under the names of the original implementations.

Such a file has no settings and no tokenizer. They come from a folder beside it or from a model on the hub, of which the
weights are not needed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type
from safetensors import SafetensorError, safe_open

from improved_diffusion.errors import UserError

SUFFIXES = (".safetensors", ".ckpt")
INDEX = "model_index.json"
UNET, VAE = "model.diffusion_model.", "first_stage_model."
# {kind, as diffusers calls it: where its text encoders are}. That of SD 1 is CLIP's, that of SD 2 OpenCLIP's.
TEXT_ENCODERS = {
    "v1": ("cond_stage_model.transformer.",),
    "v2": ("cond_stage_model.model.",),
    "xl_base": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}


def is_single_file(name: str) -> bool:
    """Whether a base of this name is one, there or not."""
    return Path(name).suffix in SUFFIXES


def kind_of(file: Path) -> str:
    """Which base is in a file, of which the header alone is read: a key of TEXT_ENCODERS.

    Raises:
        UserError: no such file, a damaged one, or something else than SD 1, SD 2 or SDXL whole.
    """
    if not file.is_file():
        raise UserError(f"the base model {file} does not exist; give a file, a folder or a name on the hub")
    if file.suffix == ".ckpt":
        raise UserError(f"the base model {file} is a pickle, which could run anything: give it as .safetensors")
    try:
        with safe_open(file, "pt") as opened:
            shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118  no dict
    except (OSError, SafetensorError) as error:
        raise UserError(f"the base model {file} cannot be read: {error}; copy or download it again") from error
    if any("lora_" in key or ".lora." in key for key in shapes):
        raise UserError(f"{file} is an adapter (LoRA) and no base: give it with --adapter, beside the --base it is for")
    guessed = infer_diffusers_model_type({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    if guessed not in TEXT_ENCODERS:
        raise UserError(f"{file} is of another architecture, {guessed}: only Stable Diffusion 1 and 2 and SDXL will do")
    parts = {kind: (UNET, VAE, *encoders) for kind, encoders in TEXT_ENCODERS.items()}
    there = {kind: [any(key.startswith(part) for key in shapes) for part in of_kind] for kind, of_kind in parts.items()}
    for kind, found in there.items():
        if all(found):
            return kind
    raise UserError(
        f"{file} holds no whole base: Stable Diffusion 1 and 2 and SDXL have a UNet, an autoencoder and text encoders, "
        f"whose weights start with {UNET}, {VAE} and, for one, {TEXT_ENCODERS['v1'][0]}"
    )


def settings_of(file: Path) -> str:
    """Where the settings and the tokenizers for a single file are: a folder beside it, of its name without the suffix
    or of that of the published model; or else the published model's name on the hub.

    Raises:
        UserError: see `kind_of`.
    """
    published = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind_of(file)]["pretrained_model_name_or_path"]
    beside = (file.with_suffix(""), file.parent / published.split("/")[1])
    return next((str(folder) for folder in beside if (folder / INDEX).is_file()), published)


def advice_on_settings(file: Path) -> str:
    """What to do where neither the folder nor the hub is there."""
    published = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind_of(file)]["pretrained_model_name_or_path"]
    folder = file.parent / published.split("/")[1]
    return (
        f"where there is a network run `hf download {published} --include '*.json' '*.txt' --local-dir DIR`, which "
        f"leaves the weights out, and bring the folder here as {folder}"
    )


def open_single_file(
    file: Path, settings: str, local_files_only: bool
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """The pipeline in a file, float32, without its safety checker.

    Raises:
        UserError: see `kind_of`.
    """
    is_sdxl = kind_of(file) == "xl_base"
    kind = StableDiffusionXLPipeline if is_sdxl else StableDiffusionPipeline
    unchecked = {} if is_sdxl else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return kind.from_single_file(
        str(file), config=settings, local_files_only=local_files_only, torch_dtype=torch.float32, **unchecked
    )
