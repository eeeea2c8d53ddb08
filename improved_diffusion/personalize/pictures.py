"""Folders that pictures are drawn into: what is missing there, so that a kill loses little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from improved_diffusion.files import atomic_write, file_sha256
from improved_diffusion.personalize.data_config import TextConfig
from improved_diffusion.personalize.generate import Sampling, draw
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.progress import progress


def model_settings(base: Base, scales: Sequence[float | None], adapter: Path | None) -> dict[str, Any]:
    """What of a model changes its pictures, for `claim`; `scales` are those of its adapters, of the UNet first."""
    return {
        "scales": list(scales),
        "precision": str(base.unet.dtype).removeprefix("torch."),
        "base": base.name,
        "adapter": file_sha256(adapter) if adapter is not None else None,  # its alpha is no weight
        "weights": base.fingerprint(),
        "text": None if base.text == TextConfig() else asdict(base.text),  # older descriptions do not tell
    }


def draw_missing(
    base: Base,
    files: Sequence[Path],
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    batch_size: int = 4,
    start: Image.Image | None = None,
    description: str | None = None,
) -> int:
    """Draw the pictures whose `files` are not there, and write each at once.

    Args:
        files: N .png files.
        base, prompts, seeds, sampling, batch_size, start: see `draw`.
        description: of the bar that shows the progress; none by default.

    Returns:
        How many were drawn.
    """
    missing = [i for i, file in enumerate(files) if not file.is_file()]
    some = [prompts[i] for i in missing], [seeds[i] for i in missing]
    hidden = description is None or not missing
    with progress(total=len(missing), desc=description, unit="picture", disable=hidden) as bar:
        for i, picture in zip(missing, draw(base, *some, sampling, batch_size, start), strict=True):
            with atomic_write(files[i]) as temporary:
                picture.save(temporary, format="png")
            bar.update()
    return len(missing)
