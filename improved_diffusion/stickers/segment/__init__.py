"""The cut-out: a network that tells a sticker from what is behind it, trained on pictures with alpha. See
docs/stickers.md.

matter = load_cutout("cutout.safetensors")      # or a run of `stickers.py segment train`
alpha = matter(picture)                         # RGB, of any size -> float32 (H, W) in [0, 1]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from improved_diffusion.stickers.segment.cutout import Cutout, load_cutout

__all__ = ["Cutout", "load_cutout"]


def __getattr__(name: str) -> Any:  # imported when it is asked for, for torch takes seconds
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("improved_diffusion.stickers.segment.cutout"), name)
