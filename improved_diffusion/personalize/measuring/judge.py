"""The models that judge pictures, and what they see in them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from improved_diffusion.metrics.inception.extractor import FeatureExtractor
from improved_diffusion.metrics.similarity import (
    copying,
    dino_embeddings,
    fidelity,
    image_embeddings,
    prompt_match,
    rgb_arrays,
    text_embeddings,
)
from improved_diffusion.personalize.models.base import fingerprint
from improved_diffusion.personalize.models.judges import load_clip, load_vision

INCEPTION = "inception"
BATCH = 32


@dataclass(frozen=True)
class Seen:
    """Embeddings of length 1 of N pictures, float32 (N, d) on the CPU; None of a model that is not there."""

    clip: Tensor | None = None
    vision: Tensor | None = None

    def __getitem__(self, rows: Sequence[int]) -> Seen:
        """Those of some of the pictures."""
        return Seen(*(None if each is None else each[rows] for each in (self.clip, self.vision)))

    def likeness(self) -> Tensor | None:
        """Those by which pictures are compared with each other: the vision model's, or else CLIP's."""
        return self.vision if self.vision is not None else self.clip


def scores_of(seen: Seen, texts: Tensor | None, real: Seen, copies: Seen) -> dict[str, Tensor]:
    """{score: one value for each of N pictures, (N,)}: all for which there is a model, and something to compare with.

    `clip_t` and `clip_i` by CLIP, `likeness` by the vision model, `copying` by it or else by CLIP; see
    metrics/similarity.py.

    Args:
        seen: the pictures.
        texts: CLIP's embeddings of their prompts, (N, d), or None.
        real: what they should be like.
        copies: what copies of it would be; of a single image, copies cannot be told.
    """
    values = {}
    if seen.clip is not None and texts is not None:
        values["clip_t"] = prompt_match(seen.clip, texts)
    if seen.clip is not None and real.clip is not None:
        values["clip_i"] = fidelity(seen.clip, real.clip)
    if seen.vision is not None and real.vision is not None:
        values["likeness"] = fidelity(seen.vision, real.vision)
    if (known := copies.likeness()) is not None and len(known) > 1:
        values["copying"] = copying(seen.likeness(), known)
    return values


class Judge:
    """CLIP, for texts and pictures, and a network for the likeness of pictures; either may be None.

    Args:
        clip: name or folder of a CLIP model.
        vision: name or folder of a DINO model, or `inception`, which is in this project and needs no download.
        device: where they run.
        group: of the settings `clip` and `vision`, which messages name: `watch.` or none.
        inception_weights: a file; by default those that are found.
    """

    def __init__(
        self,
        clip: str | None,
        vision: str | None,
        device: torch.device | str,
        group: str = "",
        inception_weights: Path | None = None,
    ):
        self.clip_name, self.vision_name, self.device = clip, vision, device
        self._clip: tuple[Any, Any] | None = load_clip(clip, device, f"--{group}clip") if clip is not None else None
        self._vision = None
        if vision is not None:
            self._vision = _vision(vision, device, f"--{group}vision", inception_weights)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Within it the networks are on their device; afterwards they `rest`."""
        for network in self.networks.values():
            network.to(self.device)
        try:
            yield
        finally:
            self.rest()

    def rest(self) -> None:
        """Make room on the device: the networks wait on the CPU until they are `at_work`."""
        for network in self.networks.values():
            network.to("cpu")

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Those that are there, of `clip` and `vision`."""
        pairs = {"clip": self._clip, "vision": self._vision}
        return {name: pair[0] for name, pair in pairs.items() if pair is not None}

    def fingerprints(self) -> dict[str, str]:
        """Of the networks: {name: SHA-256}."""
        return {name: fingerprint(network) for name, network in self.networks.items()}

    @property
    def nbytes(self) -> int:
        """Of the networks' weights."""
        return sum(tensor.nbytes for network in self.networks.values() for tensor in network.state_dict().values())

    @property
    def compares(self) -> bool:
        """Whether there is a model by which pictures can be compared."""
        return bool(self.networks)

    def see(self, pictures: Iterable[Image.Image]) -> Seen:
        """What the models make of pictures of any sizes, of which only a few are held at a time."""
        clip, vision = [], []
        pictures = iter(pictures)
        while batch := list(itertools.islice(pictures, BATCH)):
            clip += [image_embeddings(batch, *self._clip)] if self._clip else []
            vision += [self._vision[1](batch)] if self._vision else []
        return Seen(clip=torch.cat(clip) if clip else None, vision=torch.cat(vision) if vision else None)

    def read(self, texts: Sequence[str]) -> Tensor | None:
        """CLIP's embeddings of N texts, float32 (N, d) of length 1; None without CLIP."""
        return text_embeddings(list(texts), *self._clip) if self._clip else None


def _vision(
    name: str, device: torch.device | str, setting: str, inception_weights: Path | None
) -> tuple[nn.Module, Callable[[list[Image.Image]], Tensor]]:
    """A network, and what embeds pictures with it."""
    if name != INCEPTION:
        model, processor = load_vision(name, device, setting)
        return model, lambda pictures: dino_embeddings(pictures, model, processor)
    extractor = FeatureExtractor((2048,), device, inception_weights)

    def embed(pictures: list[Image.Image]) -> Tensor:
        features = [extractor(array[None])[2048].cpu() for array in rgb_arrays(pictures)]
        return F.normalize(torch.cat(features), dim=1)

    return extractor.network, embed
