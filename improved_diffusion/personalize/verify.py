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
from improved_diffusion.personalize.generate import Sampling, draw
from improved_diffusion.personalize.models.adapters import adapted_parts, adapter_parameters
from improved_diffusion.personalize.models.base import DTYPES, Base, load_base
from improved_diffusion.personalize.models.export import export_diffusers, export_kohya
from improved_diffusion.personalize.models.tuned import load_adapter
from improved_diffusion.personalize.models.words import EMBEDDINGS, export_word, learned_rows

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
    """Write what was trained: the adapters in the `form` diffusers or kohya, the learned `word`, or the whole pipeline.

    Args:
        base: in float32. What is written of it is rounded in place to the `precision`: it draws what the file will.
        word: that a run of textual inversion learned.
        form: of adapters.
        folder: of the file.
        precision: of the numbers in it, float32, fp16 or bf16; the autoencoder of a pipeline stays as it is.
        about: what the header of kohya's form says.

    Returns:
        The file, or the folder of the pipeline.

    Raises:
        UserError: kohya's form is asked for where there is no adapter, or has no name for a layer; or a number is too
            large for fp16.
    """
    dtype, parts = DTYPES[precision], adapted_parts(base)
    if form == "kohya" and not parts:
        raise UserError("kohya's form is of adapters, and this model has none: use the form diffusers")
    if parts:
        _round([parameter for part in parts.values() for parameter in adapter_parameters(part)], precision)
        return export_kohya(base, folder, dtype, about) if form == "kohya" else export_diffusers(base, folder, dtype)
    if rows := learned_rows(base):
        _round(rows.values(), precision)
        return export_word(base, word, folder, dtype)
    networks = (base.unet, *base.text_encoders.values())
    _round([parameter for network in networks for parameter in network.parameters()], precision)
    base.to(base.unet.device, precision)
    base.pipeline.save_pretrained(folder)
    base.to(base.unet.device)
    return folder


@torch.no_grad()
def _round(parameters: Iterable[nn.Parameter], precision: str) -> None:
    for parameter in parameters:
        parameter.copy_(parameter.to(DTYPES[precision]))
        if not torch.isfinite(parameter).all():
            raise UserError(f"a weight is too large for {precision}, or is none: export in bf16 or float32")


def largest_difference(base: Base, written: Path, word: str | None) -> int:
    """Of the pixels, 0 to 255, of a picture that `base` draws and one that a fresh base draws with what was written."""
    fresh = replace(load_base(str(written) if written.is_dir() else base.name), text=base.text).to(base.unet.device)
    if learned_rows(base):
        _read_word(fresh, written, word)
    elif written.is_file():
        load_adapter(fresh, written)
    one, other = (np.asarray(_picture(model, word), dtype=np.int16) for model in (base, fresh))
    return int(np.abs(one - other).max())


def _picture(base: Base, word: str | None):
    side = min(base.resolution, SIDE)
    sampling = Sampling(steps=2, guidance_scale=5.0, height=side, width=side)
    return next(draw(base, [PROMPT.format(word or "a dog")], [SEED], sampling))


def _read_word(base: Base, file: Path, word: str) -> None:
    """As a user of diffusers would."""
    state, pipeline = load_file(file), base.pipeline
    if not base.is_sdxl:
        pipeline.load_textual_inversion(str(file.parent), weight_name=file.name)
        return
    for (name, encoder), tokenizer in zip(base.text_encoders.items(), base.tokenizers, strict=True):
        pipeline.load_textual_inversion(state[EMBEDDINGS[name]], token=word, text_encoder=encoder, tokenizer=tokenizer)
