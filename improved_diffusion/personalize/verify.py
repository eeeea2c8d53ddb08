"""Exporting a tuned model, and drawing with what was written to see that it is the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.data_config import TextConfig
from improved_diffusion.personalize.generate import Sampling, draw
from improved_diffusion.personalize.models import export_single, words
from improved_diffusion.personalize.models.adapters import adapted_parts, adapter_parameters
from improved_diffusion.personalize.models.base import DTYPES, Base, load_base
from improved_diffusion.personalize.models.export import export_diffusers, export_kohya
from improved_diffusion.personalize.models.tuned import load_adapter

PROMPT = "a photo of {} on the beach"
SIDE = 256  # pixels at most of the picture that is compared
SEED = 0


def export(
    base: Base,
    word: str | None,
    form: str,
    folder: Path,
    precision: str = "float32",
    about: Mapping[str, str] | None = None,
) -> Path:
    """Write what was trained: the adapters in the `form` diffusers or kohya, the learned `word`, or the whole pipeline,
    as a folder (`diffusers`) or a single file (`single-file`).

    Args:
        base: in float32. What is written of it is rounded in place to the `precision`: it draws what the file will.
        word: that a run of textual inversion learned.
        form: diffusers, kohya or single-file.
        folder: of the file.
        precision: of the numbers in it, float32, fp16 or bf16; the autoencoder of a pipeline stays as it is.
        about: what the header of kohya's form says.

    Returns:
        The file, or the folder of the pipeline.

    Raises:
        UserError: kohya's form is asked for where there is no adapter, or has no name for a layer; a single file where
            there is one, or a word; or a number is too large for fp16.
    """
    dtype, parts = DTYPES[precision], adapted_parts(base)
    if form == "kohya" and not parts:
        raise UserError("kohya's form is of adapters, and this model has none: use the form diffusers or single-file")
    rows = words.learned_rows(base)
    if form == "single-file" and (parts or rows):
        raise UserError("a single file is a whole model, and this run learned a part beside it: use another form")
    if parts:
        _round([parameter for part in parts.values() for parameter in adapter_parameters(part)], precision)
        return export_kohya(base, folder, dtype, about) if form == "kohya" else export_diffusers(base, folder, dtype)
    if rows:
        _round(rows.values(), precision)
        return words.export_word(base, word, folder, dtype)
    networks = (base.unet, *base.text_encoders.values())
    _round([parameter for network in networks for parameter in network.parameters()], precision)
    base.to(base.unet.device, precision)
    written = folder
    if form == "single-file":
        written = export_single.export_single(base, folder)
    else:
        base.pipeline.save_pretrained(folder)
    base.to(base.unet.device)
    return written


@torch.no_grad()
def _round(parameters: Iterable[nn.Parameter], precision: str) -> None:
    for parameter in parameters:
        parameter.copy_(parameter.to(DTYPES[precision]))
        if not torch.isfinite(parameter).all():
            raise UserError(f"a weight is too large for {precision}, or is none: export in bf16 or float32")


def known_picture(base: Base, word: str | None) -> np.ndarray:
    """uint8 (H, W, 3): a picture by which a model is known, of the learned `word` if there is one."""
    side = min(base.resolution, SIDE)
    sampling = Sampling(steps=2, guidance_scale=5.0, height=side, width=side)
    return np.asarray(next(draw(base, [PROMPT.format(word or "a dog")], [SEED], sampling)))


def reread(written: Path, base: str, variant: str | None, text: TextConfig, word: str | None) -> Base:
    """A fresh model of what `export` wrote, as a user would open it.

    Args:
        written: the file or folder.
        base, variant: what adapters and words are read into.
        text: how it reads texts.
        word: that was learned.
    """
    if written.is_dir() or written.name == export_single.FILE:
        return replace(load_base(str(written)), text=text)
    fresh = replace(load_base(base, variant), text=text)
    if written.name == words.FILE:
        _read_word(fresh, written, word)
    else:
        load_adapter(fresh, written)
    return fresh


def _read_word(base: Base, file: Path, word: str) -> None:
    """As a user of diffusers would."""
    state, pipeline = load_file(file), base.pipeline
    if not base.is_sdxl:
        pipeline.load_textual_inversion(str(file.parent), weight_name=file.name)
        return
    for (name, encoder), tokenizer in zip(base.text_encoders.items(), base.tokenizers, strict=True):
        rows = state[words.EMBEDDINGS[name]]
        pipeline.load_textual_inversion(rows, token=word, text_encoder=encoder, tokenizer=tokenizer)
