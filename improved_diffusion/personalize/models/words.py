"""New words, learned as embeddings alone (textual inversion; Gal et al. 2022, arXiv:2208.01618)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from improved_diffusion.files import atomic_write
from improved_diffusion.personalize.models.base import Base

FILE = "learned_embeds.safetensors"
EMBEDDINGS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}  # as the files of SDXL call them


class ExtendedEmbedding(nn.Module):
    """A frozen table of embeddings with learned rows, float32, for the token numbers from `first` on."""

    def __init__(self, table: nn.Embedding, first: int, rows: Tensor):
        super().__init__()
        self.table = table.requires_grad_(False)
        self.first = first
        self.rows = nn.Parameter(rows.detach().float().clone())

    @property
    def weight(self) -> Tensor:
        """The table, by which other code asks for the dtype and the device."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(N, length) token numbers to (N, length, width)."""
        number = ids - self.first
        is_new = (number >= 0) & (number < len(self.rows))
        known = self.table(ids.masked_fill(is_new, 0))
        learned = self.rows.to(known.dtype)[number.clamp(0, len(self.rows) - 1)]
        return torch.where(is_new.unsqueeze(-1), learned, known)


def add_word(base: Base, word: str, like: str, vectors: int) -> None:
    """Teach the tokenizers a new `word`, standing for `vectors` embeddings, and let the encoders learn them, in place.

    They start as the embedding of the first token of the word `like`. Prompts name the word; the pipeline writes it out
    as `word word_1 word_2 ...`.
    """
    names = [word, *(f"{word}_{i}" for i in range(1, vectors))]
    for tokenizer, encoder in zip(base.tokenizers, base.text_encoders.values(), strict=True):
        tokenizer.add_tokens(names)
        numbers = tokenizer.convert_tokens_to_ids(names)
        start = tokenizer(like).input_ids[1]
        table = encoder.get_input_embeddings()
        rows = table.weight[start].expand(vectors, -1)
        encoder.set_input_embeddings(ExtendedEmbedding(table, numbers[0], rows))


def learned_rows(base: Base) -> dict[str, nn.Parameter]:
    """{component name: learned embeddings, (vectors, width)}; empty where no word was added."""
    tables = {name: encoder.get_input_embeddings() for name, encoder in base.text_encoders.items()}
    return {name: table.rows for name, table in tables.items() if isinstance(table, ExtendedEmbedding)}


def export_word(base: Base, word: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the embeddings as `load_textual_inversion` of diffusers reads them: for SD {word: rows}, for SDXL those of
    both encoders, under `clip_l` and `clip_g`. Returns the file."""
    rows = {name: parameter.detach().to("cpu", dtype).contiguous() for name, parameter in learned_rows(base).items()}
    state = (
        {EMBEDDINGS[name]: tensor for name, tensor in rows.items()} if base.is_sdxl else {word: rows["text_encoder"]}
    )
    with atomic_write(folder / FILE) as temporary:
        save_file(state, temporary)
    return folder / FILE


def advice_to_readers(base: Base) -> str | None:
    """What a user of diffusers must do beside loading the file of `export_word`; None if that is all.

    Only SDXL looks at what its (second) encoder makes of the end token.
    """
    if not base.is_sdxl:
        return None
    said, number = base.pipeline.text_encoder_2.config.eos_token_id, base.pipeline.tokenizer_2.eos_token_id
    if said == number:
        return None
    return (
        f"{base.name} says eos_token_id {said}, for which diffusers would take the new word for the end of the text: "
        f"there, set pipeline.text_encoder_2.text_model.eos_token_id = {number}"
    )
