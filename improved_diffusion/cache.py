"""Where what can be found again is kept between runs: downloaded weights, features, statistics, sums of files."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$IMPROVED_DIFFUSION_CACHE`, or else `improved_diffusion` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("IMPROVED_DIFFUSION_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "improved_diffusion"
