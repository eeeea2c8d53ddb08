"""The prompts that are tried unless others are given: what is before, in, and after the word sticker."""

from __future__ import annotations

import itertools
from pathlib import Path

from improved_diffusion.errors import UserError

BEFORE = ("", "beautiful", "pretty", "painted", "painted beautiful pretty")
STICKER = ("sticker", "telegram sticker", "cartoon sticker", "vector sticker", "digital sticker")
AFTER = (
    "",
    "on white background",
    "on transparent background",
    "on monotonous white background",
    "on monotonous black background",
    "with a white outline",
    "of a cute character",
    "in high quality",
)


def shipped_prompts() -> list[str]:
    """200 of them."""
    parts = itertools.product(BEFORE, STICKER, AFTER)
    return [" ".join(f"a {before} {sticker} {after}".split()) for before, sticker, after in parts]


def read_prompts(file: Path) -> list[str]:
    """The lines of a file, each once, without empty ones.

    Raises:
        UserError: it cannot be read, or has none.
    """
    try:
        lines = [" ".join(line.split()) for line in file.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read the prompts in {file}: {error}") from error
    prompts = list(dict.fromkeys(line for line in lines if line))
    if not prompts:
        raise UserError(f"there is no prompt in {file}: write one on each line")
    return prompts
