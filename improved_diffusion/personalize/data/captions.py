"""What becomes of a caption at each sight of its image: tags in another order, or no caption at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from improved_diffusion.personalize.config import ImagesConfig

SEPARATOR = ", "


def vary(captions: Sequence[str], images: ImagesConfig, generator: torch.Generator) -> list[str]:
    """Shuffle what stands between commas, but for the first `images.keep_tags`, and leave out whole captions with the
    probability `images.caption_dropout`, so that guidance has something to be guided away from."""
    varied = []
    for caption in captions:
        if images.shuffle_tags:
            tags = [tag.strip() for tag in caption.split(",")]
            kept, rest = tags[: images.keep_tags], tags[images.keep_tags :]
            order = torch.randperm(len(rest), generator=generator).tolist()
            caption = SEPARATOR.join([*kept, *(rest[place] for place in order)])
        dropped = torch.rand((), generator=generator).item() < images.caption_dropout
        varied.append("" if dropped else caption)
    return varied
