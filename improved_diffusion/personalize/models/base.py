"""Opening a Stable Diffusion or SDXL pipeline, and what differs between the two."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import nn
from transformers import CLIPTokenizer

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.data_config import TextConfig
from improved_diffusion.personalize.models.hub import opening, require_vocabulary

_opening = functools.partial(opening, what="base model", index="model_index.json", setting="--base")

PREDICTIONS = ("epsilon", "v_prediction")
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
    def alphas_cumprod(self) -> torch.Tensor:
        """float32 (T,): of the schedule that it was trained with."""
        return self.pipeline.scheduler.alphas_cumprod

    def fingerprint(self) -> str:
        """That of all weights that decide what is drawn."""
        return fingerprint(self.unet, *self.text_encoders.values())

    def to(self, device: torch.device | str, dtype: str = "float32", vae_dtype: str = "float32") -> Base:
        """Move the parts, in place. The autoencoder of SDXL overflows in fp16: keep it in float32. A UNet of few bits
        stays as it was loaded, on the GPU."""
        for part in (self.unet, *self.text_encoders.values()):
            if not getattr(part, "is_quantized", False):
                part.to(device, DTYPES[dtype])
        self.pipeline.vae.to(device, DTYPES[vae_dtype])
        return self


def fingerprint(*parts: nn.Module) -> str:
    """SHA-256 of a few numbers of every weight: of the same model the same, wherever its folder lies."""
    digest = hashlib.sha256()
    for part in parts:
        for name, weight in part.state_dict().items():
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def load_base(name: str, bits: int | None = None, dtype: str = "float32") -> Base:
    """The pipeline in a folder, or of that name on the Hugging Face hub, on the CPU, without its safety checker.

    Args:
        name: the folder or the name.
        bits: hold the UNet in 4 (NF4; Dettmers et al. 2023, arXiv:2305.14314) or 8 bits, which takes a GPU.
        dtype: of the weights; with `bits`, of what the UNet computes in.

    Raises:
        UserError: no such folder, a folder that is none, another kind of pipeline, or a hub that cannot be reached; the
            message says what to download and where to put it.
    """
    with _opening(name) as local_files_only:
        settings = {} if bits is None else {"quantization_config": _few_bits(bits, DTYPES[dtype])}
        pipeline = DiffusionPipeline.from_pretrained(
            name,
            local_files_only=local_files_only,
            torch_dtype=DTYPES[dtype],
            safety_checker=None,  # a network of 1.2 GB that nothing here asks
            requires_safety_checker=False,
            **settings,
        )
        if not isinstance(pipeline, StableDiffusionPipeline | StableDiffusionXLPipeline):
            kind = type(pipeline).__name__
            raise UserError(f"{name} is a {kind}: only Stable Diffusion 1 and 2 and SDXL are supported")
        base = Base(name, pipeline)
        if base.prediction not in PREDICTIONS or not hasattr(pipeline.scheduler, "alphas_cumprod"):
            raise UserError(f"{name} predicts {base.prediction!r}: only {' and '.join(PREDICTIONS)} can be trained")
        for tokenizer in base.tokenizers:
            require_vocabulary(tokenizer)
    _name_the_end_token(base)
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


def _few_bits(bits: int, dtype: torch.dtype) -> PipelineQuantizationConfig:
    details = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype} if bits == 4 else {}
    return PipelineQuantizationConfig(
        quant_backend=f"bitsandbytes_{bits}bit",
        quant_kwargs={f"load_in_{bits}bit": True, **details},
        components_to_quantize=["unet"],
    )


def load_tokenizer(name: str) -> CLIPTokenizer:
    """The tokenizer of a base model, without the rest; that of SDXL's second encoder splits words alike.

    Raises:
        UserError: see `load_base`.
    """
    with _opening(name) as local_files_only:
        tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", local_files_only=local_files_only)
        require_vocabulary(tokenizer)
    return tokenizer
