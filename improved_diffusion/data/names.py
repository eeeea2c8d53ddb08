"""Which pictures show the same thing, by their names, and which are held out.

Sets of icons hold a hand in five skin tones, and a runner as a man, a woman and a person: nearly the same mask each
time. They share a base name, which is held out as a whole, in all styles.
"""

from __future__ import annotations

import hashlib
import re

VARIANTS = re.compile(
    r"\b(?:(?:medium )?(?:light|dark) skin tone|medium skin tone|facing right|(?:red|white|curly|blond) hair|bald"
    r"|man|woman|person|men|women|people)\b"
)


def base_name(name: str) -> str:
    """What a picture called `name` shows, whoever it shows and in whatever colour: lower case, words apart by spaces.

    Runs have these names in the hash of their data.

    >>> base_name("Waving hand: medium-light skin tone")
    'waving hand'
    >>> base_name("woman-running-facing-right")
    'running'
    """
    plain = " ".join(re.findall(r"[^\W_]+", name.lower()))
    return " ".join(VARIANTS.sub(" ", plain).split()) or plain or name


def is_held_out(base: str, share: float) -> bool:
    """Whether a `base` name is among the `share` that is held out: by a hash of it, so whatever others there are."""
    return int.from_bytes(hashlib.sha256(base.encode()).digest()[:8], "big") < share * 2**64
