"""Images and texts as a training step needs them: latents of several crops, and embeddings; kept, or made anew."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from improved_diffusion.personalize.config import ImagesConfig, TextConfig
from improved_diffusion.personalize.data.captioned import CaptionedImage
from improved_diffusion.personalize.data.crops import Crop, cut, variants
from improved_diffusion.personalize.data.encoded_files import EncodedFiles
from improved_diffusion.personalize.data.masks import latent_mask
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.models.encoding import encode_texts, latent_moments
from improved_diffusion.progress import progress


class Latents(NamedTuple):
    """What the autoencoder makes of N crops: its distribution, how the crops were cut, and what of them counts."""

    mean: Tensor  # float32 (N, 4, h, w)
    std: Tensor  # float32 (N, 4, h, w)
    size_ids: Tensor  # float32 (N, 6), SDXL's conditions
    mask: Tensor  # float32 (N, 1, h, w) on [0, 1]: what counts in the loss


class Examples:
    """Images as latents, each in all its crops.

    Args:
        base: whose autoencoder encodes them.
        images: to learn from.
        sizes: (height, width) in pixels to which each is cut.
        config: crops, flips, background, and whether to keep latents. Those of all crops are kept on the CPU, mean and
            deviation, so that each step can still draw from the distribution.
        files: where they are kept from run to run, or None.
        share: which of how many processes this is. Each begins with other images, and so finds in the files what the
            others have encoded meanwhile.
    """

    def __init__(
        self,
        base: Base,
        images: Sequence[CaptionedImage],
        sizes: Sequence[tuple[int, int]],
        config: ImagesConfig,
        files: EncodedFiles | None = None,
        share: tuple[int, int] = (0, 1),
    ):
        self.base = base
        self.images = tuple(images)
        self.sizes = tuple(sizes)
        self.background = config.background
        self.variants = variants(config.crops, config.flip)
        self._kept = self._encode_all(files, *share) if config.cache else None

    def __call__(self, indices: Sequence[int], variant: Sequence[int]) -> Latents:
        """Latents of the images `indices`, all of one size, each in the crop of number `variant`, on the CPU."""
        pairs = list(zip(indices, variant, strict=True))
        if self._kept is None:
            encoded = self._encode([self._crop(index, number) for index, number in pairs])
            masks = [self._mask(index, number, encoded["mean"]) for index, number in pairs]
            return Latents(**encoded, mask=torch.stack(masks))
        return Latents(*(torch.stack(tensors) for tensors in zip(*(self._kept[pair] for pair in pairs), strict=True)))

    def _encode_all(self, files: EncodedFiles | None, process: int, processes: int) -> dict[tuple[int, int], Latents]:
        """{(image, variant): its latents, without the first dimension}. One by one, for encoding takes much memory."""
        kept, first = {}, len(self.images) * process // processes
        with progress(total=len(self.images), desc="encoding images", unit="image", leave=False) as bar:
            for index in (*range(first, len(self.images)), *range(first)):
                content = hashlib.sha256(self.images[index].read()).hexdigest() if files is not None else ""
                for number, variant in enumerate(self.variants):
                    encode = functools.partial(self._encode_one, index, number)
                    key = (content, self.sizes[index], variant, self.background)
                    encoded = encode() if files is None else files.find(key, encode)
                    # The files hold no masks: of other masks an image has the same latents.
                    kept[index, number] = Latents(**encoded, mask=self._mask(index, number, encoded["mean"]))
                bar.update()
        return kept

    def _encode_one(self, index: int, number: int) -> dict[str, Tensor]:
        return {name: tensor[0] for name, tensor in self._encode([self._crop(index, number)]).items()}

    def _crop(self, index: int, number: int) -> Crop:
        return cut(self.images[index].load(self.background), self.sizes[index], *self.variants[number])

    def _mask(self, index: int, number: int, latents: Tensor) -> Tensor:
        return latent_mask(self.images[index], self.sizes[index], *self.variants[number], latents.shape[-2:])

    def _encode(self, crops: list[Crop]) -> dict[str, Tensor]:
        mean, std = latent_moments(self.base, torch.stack([crop.pixels for crop in crops]))
        return {"mean": mean.cpu(), "std": std.cpu(), "size_ids": torch.stack([crop.size_ids for crop in crops])}


class Conditions:
    """Texts as the UNet is told of them; kept, once encoded, where nothing that they pass through is trained.

    Args:
        base: whose text encoders encode them.
        keep: whether to.
        files: where they are kept from run to run, or None.
    """

    def __init__(self, base: Base, keep: bool, files: EncodedFiles | None = None):
        self.base, self.files = base, files
        self._kept: dict[str, dict[str, Tensor]] | None = {} if keep else None

    def encode(self, texts: Iterable[str]) -> None:
        """Encode them now, if they are kept: from then on the text encoders are not asked."""
        if self._kept is not None:
            for text in dict.fromkeys(texts):
                self([text])

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """See `encode_texts`; with gradients where they are not kept."""
        if self._kept is None:
            return encode_texts(self.base, list(texts))
        for text in texts:
            if text not in self._kept:
                encode = functools.partial(self._encode_one, text)
                self._kept[text] = encode() if self.files is None else self.files.find(self._key(text), encode)
        kept = [self._kept[text] for text in texts]
        return {name: torch.stack([of_text[name] for of_text in kept]) for name in kept[0]}

    def _key(self, text: str) -> object:
        how = self.base.text
        return text if how == TextConfig() else (text, how.clip_skip, how.max_token_length)

    @torch.no_grad()
    def _encode_one(self, text: str) -> dict[str, Tensor]:
        return {name: tensor[0].cpu() for name, tensor in encode_texts(self.base, [text]).items()}
