"""Which pictures show the same thing, and which are held out.

Sets of icons hold a hand in five skin tones, and a runner as a man, a woman and a person: nearly the same mask each
time. They share a base name, and a base name is held out as a whole, in all styles.
"""

from __future__ import annotations

import hashlib
import re

VARIANTS = (
    r"(medium )?(light|dark) skin tone",
    r"medium skin tone",
    r"facing right",
    r"(red|white|curly|blond) hair|bald|beard",
)
SEXES = {
    **dict.fromkeys(("man", "woman", "men", "women", "people", "male", "female", "boy", "girl", "child"), "person"),
    **dict.fromkeys(("his", "her"), "their"),
}


def base_name(name: str) -> str:
    """What a picture called `name` shows, whoever it shows and in whatever colour: lower case, words apart by spaces.

    >>> base_name("Waving hand: medium-light skin tone")
    'waving hand'
    >>> base_name("woman-running-facing-right")
    'person running'
    """
    plain = " ".join(re.findall(r"[^\W_]+", name.lower()))
    base = re.sub(rf"\b({'|'.join(VARIANTS)})\b", " ", plain)
    words = [SEXES.get(word, word) for word in base.split()]
    return " ".join(words) or plain or name


def is_held_out(base: str, share: float) -> bool:
    """Whether a `base` name is among the `share` that is held out: by a hash of it, so whatever others there are."""
    return int.from_bytes(hashlib.sha256(base.encode()).digest()[:8], "big") < share * 2**64
