"""Folders that pictures are drawn into: with what settings, and what is missing, so that a kill loses little."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.personalize.generate import Sampling, draw
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.progress import progress


def claim(description: Path, settings: dict[str, Any], advice: str) -> None:
    """Write to the file `description` with what `settings` the pictures of its folder are drawn; where it is there
    already, see that they are the same.

    Raises:
        UserError: they are not; the message names the first that differs, and gives the `advice`.
    """
    if not description.is_file():
        with atomic_write(description) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
        return
    folder = description.parent
    try:
        other = dict(json.loads(description.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{description} is damaged: {advice}") from error
    for name, value in settings.items():
        if other.get(name) != value:
            was, now = map(reprlib.repr, (other.get(name), value))
            raise UserError(f"the pictures in {folder} were drawn with {name} {was}, not {now}: {advice}")


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
