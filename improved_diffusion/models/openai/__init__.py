"""Import of checkpoints in the format of openai/improved-diffusion, the published ones above all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from improved_diffusion.models.openai.conversion import load_checkpoint

__all__ = ["load_checkpoint"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from improved_diffusion.models.openai import conversion  # only now, for torch takes seconds to import

    return getattr(conversion, name)
