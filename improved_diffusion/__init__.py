"""Pixel-space diffusion, from the mathematics to a measured image: see README.md for the map of the code.

model = improved_diffusion.load("runs/hybrid")       # or a checkpoint, a .safetensors file, or "pretrained"
images = model.sample(["creme_brulee"], n=8, seed=0, steps=25, sampler="dpmpp_2m")      # uint8 (8, 64, 64, 3)
improved_diffusion.fid("data/food101-64/val", images)                                   # a Measurement
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from improved_diffusion.metrics.measure import Measurement
    from improved_diffusion.sampling.loading import load
    from improved_diffusion.sampling.measuring import fid
    from improved_diffusion.sampling.model import Model

__version__ = "0.1.0"
__all__ = ["Measurement", "Model", "__version__", "fid", "load"]

# Imported when they are asked for, for torch takes seconds.
_HOMES = {
    "Measurement": "improved_diffusion.metrics.measure",
    "Model": "improved_diffusion.sampling.model",
    "fid": "improved_diffusion.sampling.measuring",
    "load": "improved_diffusion.sampling.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
