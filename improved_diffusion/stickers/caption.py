"""What photographs show, in words, by BLIP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from improved_diffusion.personalize.data.captioning import describe
from improved_diffusion.personalize.models.base import fingerprint
from improved_diffusion.personalize.models.judges import load_blip
from improved_diffusion.stickers.photos import Outcome, Photo, make_each


def caption_photos(
    photos: Sequence[Photo], out: Path, model_name: str, prefix: str, device: torch.device | str
) -> Outcome:
    """Write out/NAME.txt for each photograph; see `make_each`.

    Args:
        model_name: of a BLIP model, a folder or a name on the hub.
        prefix: words that each caption starts with.

    Raises:
        UserError: as `load_blip` and `make_each` do.
    """
    model, processor = load_blip(model_name, device, "--blip")

    def make(photo: Photo) -> bytes:
        return (describe([photo.load()], model, processor, prefix)[0] + "\n").encode()

    return make_each(photos, out, ".txt", {"model": fingerprint(model), "prefix": prefix}, make, "captioning")
