"""Images of any channels as RGB, for who looks at them or measures them."""

from __future__ import annotations

import torch
from torch import Tensor


def on_white(images: Tensor) -> Tensor:
    """uint8 images (..., 1, 3 or 4) as uint8 (..., 3): grey is repeated, RGBA is composited on white.

    It rounds as Pillow does, so that an image counts the same whether it comes from memory or from its file.
    """
    channels = images.shape[-1]
    if channels == 3:
        return images
    if channels == 1:
        return images.expand(*images.shape[:-1], 3)
    colours, alpha = images[..., :3].to(torch.int32), images[..., 3:].to(torch.int32)
    blended = colours * alpha + 255 * (255 - alpha) + 128
    return ((blended + (blended >> 8)) >> 8).to(torch.uint8)
