"""Packed image sets: what the rest of the project trains on and measures against.

A packed set is a directory with `images.npy` (N, H, W, C) uint8, `labels.npy` (N,) int64 and `dataset.json`.
Make one with `python -m improved_diffusion.data`, open it with `open_image_set`.
"""

from improved_diffusion.data.image_set import ImageSet, open_image_set

__all__ = ["ImageSet", "open_image_set"]
