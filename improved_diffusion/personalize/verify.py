"""Exporting a tuned model, and drawing with what was written to see that it is the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.generate import Sampling, draw
from improved_diffusion.personalize.models.adapters import adapted_parts
from improved_diffusion.personalize.models.base import Base, load_base
from improved_diffusion.personalize.models.export import export_diffusers, export_kohya
from improved_diffusion.personalize.models.tuned import load_adapter
from improved_diffusion.personalize.models.words import EMBEDDINGS, export_word, learned_rows

PROMPT = "a photo of {} on the beach"
SIDE = 256  # pixels at most of the picture that is compared
SEED = 0


def export(base: Base, word: str | None, form: str, folder: Path) -> Path:
    """Write what was trained: the adapters in the `form` diffusers or kohya, the learned `word`, or the whole pipeline.

    Returns:
        The file, or the folder of the pipeline.

    Raises:
        UserError: kohya's form is asked for where there is no adapter, or has no name for a layer.
    """
    if adapted_parts(base):
        return {"diffusers": export_diffusers, "kohya": export_kohya}[form](base, folder)
    if form == "kohya":
        raise UserError("kohya's form is of adapters, and this model has none: use the form diffusers")
    if learned_rows(base):
        return export_word(base, word, folder)
    base.pipeline.save_pretrained(folder)
    return folder


def largest_difference(base: Base, written: Path, word: str | None) -> int:
    """Of the pixels, 0 to 255, of a picture that `base` draws and one that a fresh base draws with what was written."""
    fresh = load_base(str(written) if written.is_dir() else base.name).to(base.unet.device)
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
