"""Prompts that show what a tuned model can do with its subject. `{token}` and `{class}` are filled in."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from improved_diffusion.errors import UserError

# Clothes, style, place, action: what is hard for a subject learned from few pictures, each in its own way.
SHORT = (
    "a {token} {class} wearing a red t-shirt",
    "a {token} {class} in the style of van gogh",
    "a {token} {class} in the forest",
    "a {token} {class} driving a car",
)

# The prompts of DreamBooth's data set (Ruiz et al. 2022; github.com/google/dreambooth, CC BY 4.0).
_PLACES = (
    "a {token} {class} in the jungle",
    "a {token} {class} in the snow",
    "a {token} {class} on the beach",
    "a {token} {class} on a cobblestone street",
    "a {token} {class} on top of pink fabric",
    "a {token} {class} on top of a wooden floor",
    "a {token} {class} with a city in the background",
    "a {token} {class} with a mountain in the background",
    "a {token} {class} with a blue house in the background",
    "a {token} {class} on top of a purple rug in a forest",
)
_PROPERTIES = (
    "a red {token} {class}",
    "a purple {token} {class}",
    "a shiny {token} {class}",
    "a wet {token} {class}",
    "a cube shaped {token} {class}",
)
OBJECT = (
    *_PLACES,
    "a {token} {class} with a wheat field in the background",
    "a {token} {class} with a tree and autumn leaves in the background",
    "a {token} {class} with the Eiffel Tower in the background",
    "a {token} {class} floating on top of water",
    "a {token} {class} floating in an ocean of milk",
    "a {token} {class} on top of green grass with sunflowers around it",
    "a {token} {class} on top of a mirror",
    "a {token} {class} on top of the sidewalk in a crowded street",
    "a {token} {class} on top of a dirt road",
    "a {token} {class} on top of a white rug",
    *_PROPERTIES,
)
LIVE = (
    *_PLACES,
    "a {token} {class} wearing a red hat",
    "a {token} {class} wearing a santa hat",
    "a {token} {class} wearing a rainbow scarf",
    "a {token} {class} wearing a black top hat and a monocle",
    "a {token} {class} in a chef outfit",
    "a {token} {class} in a firefighter outfit",
    "a {token} {class} in a police outfit",
    "a {token} {class} wearing pink glasses",
    "a {token} {class} wearing a yellow shirt",
    "a {token} {class} in a purple wizard outfit",
    *_PROPERTIES,
)
SUITES = {"short": SHORT, "object": OBJECT, "live": LIVE}


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


def names(prompt: str, token: str) -> bool:
    """Whether the prompt has this token, as a word of its own."""
    return re.search(_as_word(token), prompt) is not None


def without_tokens(prompt: str, tokens: Iterable[str]) -> str:
    """The prompt as CLIP is to read it: it has not learned these tokens, and takes sks for a rifle. (Custom Diffusion,
    Kumari et al. 2023, measures so.) A prompt of nothing else stays as it is."""
    left = prompt
    for token in tokens:
        left = re.sub(rf"\s*{_as_word(token)}", "", left)
    return left.strip() or prompt


def _as_word(token: str) -> str:
    return rf"(?<!\w){re.escape(token)}(?!\w)"
