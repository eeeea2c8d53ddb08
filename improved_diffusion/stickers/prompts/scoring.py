"""How well each prompt fits each picture, by CLIP score and PickScore; what was scored before is not scored again.

OUT/scores/MODEL/PICTURE.json    {prompt: score}; MODEL and PICTURE are what is left of hashes
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from improved_diffusion.errors import UserError
from improved_diffusion.files import file_sha256, write_text
from improved_diffusion.metrics.similarity import image_embeddings, logit_scale, text_embeddings
from improved_diffusion.personalize.data.captioned import CaptionedImage, open_captioned_set
from improved_diffusion.personalize.models.base import fingerprint
from improved_diffusion.personalize.models.judges import load_clip
from improved_diffusion.progress import progress

BATCH = 32
DIGITS = 16  # of a hash, in names of files


@dataclass(frozen=True, eq=False)
class Scorer:
    """A model of CLIP's kind, and by what its cosines are multiplied."""

    name: str
    model: nn.Module
    processor: Any
    scale: float
    least: float  # what a score cannot fall below

    def __call__(self, images: list, texts: Sequence[str]) -> np.ndarray:
        """float32 (N images, P texts)."""
        embedded = image_embeddings(images, self.model, self.processor)
        cosines = embedded @ text_embeddings(texts, self.model, self.processor).T
        return (self.scale * cosines).clamp(min=self.least).numpy()


def open_scorers(clip: str, pick: str | None, device: torch.device | str) -> list[Scorer]:
    """CLIP score (Hessel et al. 2021) and, if it is given, PickScore (Kirstain et al. 2023); see metrics/similarity.py.

    Raises:
        UserError: as `load_clip` does.
    """
    scorers = [Scorer("CLIP score", *load_clip(clip, device, "--clip"), scale=100.0, least=0.0)]
    if pick is not None:
        model, processor = load_clip(pick, device, "--pick")
        scorers.append(Scorer("PickScore", model, processor, logit_scale(model), -np.inf))
    return scorers


@dataclass(frozen=True)
class PictureSet:
    """Pictures of one quality."""

    name: str
    images: tuple[CaptionedImage, ...]
    digests: tuple[str, ...]  # SHA-256 of their files


def open_sets(folders: Sequence[Path]) -> list[PictureSet]:
    """The pictures in each folder.

    Raises:
        UserError: fewer than two sets, two of one name, or one with fewer than two pictures.
    """
    if len(folders) < 2:
        raise UserError("to tell good from bad takes two sets of pictures at least: give them, the best first")
    sets = []
    for folder in folders:
        images = open_captioned_set(folder).images
        if len(images) < 2:
            raise UserError(f"{folder} has one picture, and an interval takes two at least")
        name = folder.resolve().name
        if name in [other.name for other in sets]:
            raise UserError(f"two sets are called {name}: rename a folder")
        sets.append(PictureSet(name, images, tuple(sha256(image.read()).hexdigest() for image in images)))
    return sets


def set_of_files(name: str, files: Sequence[Path]) -> PictureSet:
    """Pictures that were drawn."""
    images = tuple(CaptionedImage(file.name, None, file.read_bytes) for file in files)
    return PictureSet(name, images, tuple(file_sha256(file) for file in files))


def score_sets(scorer: Scorer, sets: Sequence[PictureSet], prompts: Sequence[str], out: Path) -> list[np.ndarray]:
    """For each set float32 (N pictures, P prompts). A kill loses at most the last BATCH pictures.

    Raises:
        UserError: a score cannot be written.
    """
    folder = out / "scores" / f"{scorer.name.replace(' ', '-')}-{fingerprint(scorer.model)[:DIGITS]}"
    pictures = {digest: image for group in sets for image, digest in zip(group.images, group.digests, strict=True)}
    known = {digest: _read(folder / f"{digest[:DIGITS]}.json") for digest in pictures}
    missing = [digest for digest, scores in known.items() if not scores.keys() >= set(prompts)]
    with progress(total=len(missing), desc=scorer.name, unit="picture", disable=not missing) as bar:
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            scores = scorer([pictures[digest].load() for digest in batch], prompts)
            for digest, row in zip(batch, scores.tolist(), strict=True):
                known[digest] |= dict(zip(prompts, row, strict=True))
                write_text(folder / f"{digest[:DIGITS]}.json", json.dumps(known[digest], indent=0), durable=False)
            bar.update(len(batch))
    return [
        np.array([[known[digest][prompt] for prompt in prompts] for digest in group.digests], np.float32)
        for group in sets
    ]


def _read(file: Path) -> dict[str, float]:
    """Nothing, where there is no such file or a damaged one."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
