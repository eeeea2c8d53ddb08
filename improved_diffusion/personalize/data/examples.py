"""Images and texts as a training step needs them: latents of several crops, and embeddings; kept, or made anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from improved_diffusion.personalize.config import ImagesConfig
from improved_diffusion.personalize.data.captioned import CaptionedImage
from improved_diffusion.personalize.data.crops import Crop, cut, variants
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.models.encoding import encode_texts, latent_moments
from improved_diffusion.progress import progress


class Latents(NamedTuple):
    """What the autoencoder makes of N crops: its distribution, and how the crops were cut."""

    mean: Tensor  # float32 (N, 4, h, w)
    std: Tensor  # float32 (N, 4, h, w)
    size_ids: Tensor  # float32 (N, 6), SDXL's conditions


class Examples:
    """Images as latents, each in all its crops.

    Args:
        base: whose autoencoder encodes them.
        images: to learn from.
        sizes: (height, width) in pixels to which each is cut.
        config: crops, flips, background, and whether to keep latents. Those of all crops are kept on the CPU, mean and
            deviation, so that each step can still draw from the distribution.
    """

    def __init__(
        self, base: Base, images: Sequence[CaptionedImage], sizes: Sequence[tuple[int, int]], config: ImagesConfig
    ):
        self.base = base
        self.images = tuple(images)
        self.sizes = tuple(sizes)
        self.background = config.background
        self.variants = variants(config.crops, config.flip)
        self._kept = self._encode_all() if config.cache else None

    def __call__(self, indices: Sequence[int], variant: Sequence[int]) -> Latents:
        """Latents of the images `indices`, all of one size, each in the crop of number `variant`, on the CPU."""
        pairs = list(zip(indices, variant, strict=True))
        if self._kept is None:
            return self._encode([self._crop(index, number) for index, number in pairs])
        return Latents(*(torch.stack(tensors) for tensors in zip(*(self._kept[pair] for pair in pairs), strict=True)))

    def _encode_all(self) -> dict[tuple[int, int], Latents]:
        """{(image, variant): its latents, without the first dimension}."""
        kept = {}
        with progress(total=len(self.images), desc="encoding images", unit="image", leave=False) as bar:
            for index in range(len(self.images)):
                for number in range(len(self.variants)):
                    kept[index, number] = Latents(*(t[0] for t in self._encode([self._crop(index, number)])))
                bar.update()
        return kept

    def _crop(self, index: int, number: int) -> Crop:
        return cut(self.images[index].load(self.background), self.sizes[index], *self.variants[number])

    def _encode(self, crops: list[Crop]) -> Latents:
        mean, std = latent_moments(self.base, torch.stack([crop.pixels for crop in crops]))
        return Latents(mean.cpu(), std.cpu(), torch.stack([crop.size_ids for crop in crops]))


class Conditions:
    """Texts as the UNet is told of them; kept, once encoded, where nothing that they pass through is trained."""

    def __init__(self, base: Base, keep: bool):
        self.base = base
        self._kept: dict[str, dict[str, Tensor]] | None = {} if keep else None

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """See `encode_texts`; with gradients where they are not kept."""
        if self._kept is None:
            return encode_texts(self.base, list(texts))
        for text in texts:
            if text not in self._kept:
                with torch.no_grad():
                    encoded = encode_texts(self.base, [text])
                self._kept[text] = {name: tensor[0].cpu() for name, tensor in encoded.items()}
        kept = [self._kept[text] for text in texts]
        return {name: torch.stack([of_text[name] for of_text in kept]) for name in kept[0]}
