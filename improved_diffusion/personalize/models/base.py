"""Opening a Stable Diffusion or SDXL pipeline, and what differs between the two."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import nn
from transformers import CLIPTokenizer

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.data_config import TextConfig
from improved_diffusion.personalize.models.hub import opening, require_vocabulary
from improved_diffusion.personalize.models.single_file import (
    INDEX,
    advice_on_settings,
    is_single_file,
    open_single_file,
    settings_of,
)
from improved_diffusion.settings import require

PREDICTIONS = ("epsilon", "v_prediction")
TILE = 512  # pixels, in place of what a config says: 1024 of SDXL, where nothing would be gained
ALIGNMENT = 64  # bytes, as PyTorch allocates
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class Base:
    """A base model: its pipeline, and its parts in the order in which the pipeline uses them.

    Raises:
        UserError: `text` skips more layers than its text encoders have.
    """

    name: str  # hub name or path, as it was given
    pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline
    text: TextConfig = TextConfig()  # how it reads texts
    variant: str | None = None  # of the files with its weights

    def __post_init__(self) -> None:
        if self.text.clip_skip > 1:  # of SDXL the last layers are never read
            layers = min(encoder.config.num_hidden_layers for encoder in self.text_encoders.values()) - self.is_sdxl
            if self.text.clip_skip > layers:
                raise UserError(f"the clip skip {self.text.clip_skip} is too large for {self.name}: at most {layers}")

    @property
    def is_sdxl(self) -> bool:
        return isinstance(self.pipeline, StableDiffusionXLPipeline)

    @property
    def unet(self) -> nn.Module:
        return self.pipeline.unet

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """{component name: encoder}: one of SD, two of SDXL."""
        names = ("text_encoder", "text_encoder_2") if self.is_sdxl else ("text_encoder",)
        return {name: getattr(self.pipeline, name) for name in names}

    @property
    def tokenizers(self) -> list[Any]:
        """In the order of the text encoders."""
        return [self.pipeline.tokenizer, self.pipeline.tokenizer_2] if self.is_sdxl else [self.pipeline.tokenizer]

    @property
    def resolution(self) -> int:
        """Pixels a side that the model was made for."""
        return self.unet.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def prediction(self) -> str:
        """What the network predicts: `epsilon` or `v_prediction`."""
        return self.pipeline.scheduler.config.prediction_type

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether its noise schedule was rescaled to end in noise alone."""
        return bool(self.pipeline.scheduler.config.get("rescale_betas_zero_snr", False))

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """float32 (T,): of the schedule that it was trained with."""
        return self.pipeline.scheduler.alphas_cumprod

    def fingerprint(self) -> str:
        """That of all weights that decide what is drawn."""
        return fingerprint(self.unet, *self.text_encoders.values())

    @property
    def networks(self) -> dict[str, nn.Module]:
        """{component name: network} of all that have weights."""
        return {"unet": self.unet, "vae": self.pipeline.vae, **self.text_encoders}

    @property
    def device(self) -> torch.device:
        """Where it computes, also where parts wait on the CPU until they are needed (`enable_model_cpu_offload`)."""
        return self.pipeline._execution_device

    def to(self, device: torch.device | str, dtype: str = "float32", vae_dtype: str = "float32") -> Base:
        """Move the parts, in place. The autoencoder of SDXL overflows in fp16: keep it in float32."""
        dtypes = {part: DTYPES[dtype] for part in (self.unet, *self.text_encoders.values())}
        for part, wanted in {**dtypes, self.pipeline.vae: DTYPES[vae_dtype]}.items():
            part.to(device)
            # diffusers warns of any cast, also of one to what a part is.
            if any(parameter.dtype != wanted for parameter in part.parameters()):
                part.to(wanted)
        return self

    def place(self, device: torch.device | str, *names: str) -> Base:
        """Move these components to the device and the others to the CPU, in place; without names all."""
        for name, part in self.networks.items():
            part.to(device if not names or name in names else "cpu")
        return self

    @contextlib.contextmanager
    def drawing(self, device: torch.device | str, offload: bool, afterwards: Sequence[str]) -> Iterator[None]:
        """Within it the base draws on the device: with all of its parts there, or each only while it is at work
        (`offload`). Afterwards these components are there, and the others on the CPU."""
        if offload:
            self.pipeline.enable_model_cpu_offload(device=device)
        else:
            self.place(device)
        try:
            yield
        finally:
            if offload:
                self.pipeline.remove_all_hooks()
            self.place(device, *afterwards)

    def tile_vae(self) -> None:
        """Let the autoencoder work on large pictures in tiles of TILE pixels, which takes less memory and changes them
        a little."""
        vae = self.pipeline.vae
        vae.enable_tiling()
        vae.tile_sample_min_size = TILE
        vae.tile_latent_min_size = TILE // self.pipeline.vae_scale_factor


def fingerprint(*parts: nn.Module) -> str:
    """SHA-256 of a few numbers of every weight: of the same model the same, wherever its folder lies."""
    digest = hashlib.sha256()
    for part in parts:
        for name, weight in part.state_dict().items():
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _opening(name: str) -> Iterator[tuple[str, bool]]:
    """See `hub.opening`. Yields also where the settings and tokenizers are, which a single file has not."""
    if not is_single_file(name):
        with opening(name, "base model", INDEX, "--base") as local_files_only:
            yield name, local_files_only
        return
    settings = settings_of(Path(name))
    what = f"model that {name} takes its settings and tokenizers from,"
    with opening(settings, what, INDEX, "--base", advice_on_settings(Path(name))) as local_files_only:
        yield settings, local_files_only


def load_base(name: str, variant: str | None = None) -> Base:
    """The pipeline in a folder, in a single file or of that name on the Hugging Face hub: on the CPU, in float32,
    without its safety checker.

    Args:
        name: the folder, the .safetensors file, whose settings single_file.py looks for, or the name.
        variant: of the files with the weights, of which there may be several: `fp16`, say.

    Raises:
        UserError: no such folder, a folder that is none, another kind of pipeline, or a hub that cannot be reached; the
            message says what to download and where to put it.
    """
    require(variant is None or not is_single_file(name), f"{name} is a single file, which has no variant {variant}")
    with _opening(name) as (settings, local_files_only):
        if is_single_file(name):
            pipeline = open_single_file(Path(name), settings, local_files_only)
        else:
            pipeline = DiffusionPipeline.from_pretrained(
                name,
                variant=variant,
                local_files_only=local_files_only,
                torch_dtype=torch.float32,
                safety_checker=None,  # a network of 1.2 GB that nothing here asks
                requires_safety_checker=False,
            )
        if not isinstance(pipeline, StableDiffusionPipeline | StableDiffusionXLPipeline):
            kind = type(pipeline).__name__
            raise UserError(f"{name} is a {kind}: only Stable Diffusion 1 and 2 and SDXL are supported")
        base = Base(name, pipeline, variant=variant)
        if base.prediction not in PREDICTIONS or not hasattr(pipeline.scheduler, "alphas_cumprod"):
            raise UserError(f"{name} predicts {base.prediction!r}: only {' and '.join(PREDICTIONS)} can be trained")
        for tokenizer in base.tokenizers:
            require_vocabulary(tokenizer)
    _name_the_end_token(base)
    _align(base)
    pipeline.set_progress_bar_config(disable=True)
    return base


def _name_the_end_token(base: Base) -> None:
    """Tell the text encoders the number of the token that ends a text, in place.

    Published configs say 2, upon which transformers takes the highest number of a text for its end: the same token,
    until a word is added, whose number is higher."""
    for tokenizer, encoder in zip(base.tokenizers, base.text_encoders.values(), strict=True):
        for module in encoder.modules():
            if hasattr(module, "eos_token_id"):
                module.eos_token_id = tokenizer.eos_token_id


def _align(base: Base) -> None:
    """Copy weights that lie wherever a file has them, in place, to where PyTorch puts its own: on a CPU products of
    matrices have other last digits at odd addresses."""
    for network in base.networks.values():
        for parameter in network.parameters():
            if parameter.data_ptr() % ALIGNMENT:
                parameter.data = parameter.data.clone()


def load_tokenizer(name: str) -> CLIPTokenizer:
    """The tokenizer of a base model, without the rest; that of SDXL's second encoder splits words alike.

    Raises:
        UserError: see `load_base`.
    """
    with _opening(name) as (settings, local_files_only):
        tokenizer = CLIPTokenizer.from_pretrained(settings, subfolder="tokenizer", local_files_only=local_files_only)
        require_vocabulary(tokenizer)
    return tokenizer
