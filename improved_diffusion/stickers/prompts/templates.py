"""The prompts that are tried unless others are given: what is before, in, and after the word sticker."""

from __future__ import annotations

import itertools

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
