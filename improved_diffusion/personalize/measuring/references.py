"""The images that the subject was learned from, as pictures are compared with them, and all scores of a picture."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from improved_diffusion.personalize.config import PersonalizeConfig
from improved_diffusion.personalize.data.captioned import CaptionedImage
from improved_diffusion.personalize.data.crops import fit
from improved_diffusion.personalize.data.learned import Captioned
from improved_diffusion.personalize.measuring.judge import Judge, Seen, scores_of
from improved_diffusion.personalize.measuring.prompts import names, without_tokens
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.models.encoding import rendered
from improved_diffusion.progress import progress


@dataclass(frozen=True)
class References:
    """The training images of a concept, and what copies of them would be."""

    token: str | None  # that names it in prompts
    images: int  # how many it has, of which these are all or some
    real: Seen
    copies: Seen  # as the autoencoder renders them: a copy is no sharper


def see_training(
    base: Base, judge: Judge, training: Captioned, config: PersonalizeConfig, resolution: int
) -> list[References]:
    """Of each concept squares of its training images, `resolution` pixels a side, before and after the autoencoder of
    `base`: of at most `watch.max_references` of them."""
    return [
        _see(base, judge, training.of(concept).images, part, resolution) for concept, part in enumerate(config.parts)
    ]


def choose(images: Sequence[CaptionedImage], most: int | None) -> Sequence[CaptionedImage]:
    """`most` of the images, by a hash of their content: neither their names nor their order matter."""
    if most is None or len(images) <= most:
        return images
    digests = [hashlib.sha256(image.read()).digest() for image in images]
    chosen = sorted(range(len(images)), key=digests.__getitem__)[:most]
    return [images[index] for index in sorted(chosen)]


def _see(
    base: Base, judge: Judge, images: Sequence[CaptionedImage], config: PersonalizeConfig, resolution: int
) -> References:
    about = config.subject.token, len(images)
    images, background = choose(images, config.watch.max_references), config.images.background

    def squares() -> Iterator[Image.Image]:
        with progress(total=len(images), desc="looking at the training images", unit="image", leave=False) as bar:
            for image in images:
                yield fit(image.load(background), (resolution, resolution))[0]
                bar.update()

    if not judge.compares:
        return References(*about, Seen(), Seen())
    return References(*about, judge.see(squares()), judge.see(rendered(base, square) for square in squares()))


def score_pictures(
    judge: Judge, seen: Seen, prompts: Sequence[str], references: Sequence[References]
) -> dict[str, Tensor]:
    """{score: one value for each of N pictures, (N,)}; see `scores_of`. CLIP reads the prompts without the tokens.

    Args:
        judge: of the prompts.
        seen: the pictures.
        prompts: theirs, N.
        references: the training images of each concept. A picture is compared with those of the concepts that its
            prompt names, or of all if it names none. Of a single image, copies cannot be told.
    """
    tokens = [of.token for of in references if of.token is not None]
    texts = judge.read([without_tokens(prompt, tokens) for prompt in prompts])
    scored, order = [], []
    for concepts, rows in _rows_of(prompts, references).items():
        real, copies = (_joined([getattr(references[c], name) for c in concepts]) for name in ("real", "copies"))
        scored.append(scores_of(seen[rows], None if texts is None else texts[rows], real, copies))
        order += rows
    common = [name for name in scored[0] if all(name in values for values in scored)]
    back = torch.tensor(order).argsort()
    return {name: torch.cat([values[name] for values in scored])[back] for name in common}


def rows_by_concept(prompts: Sequence[str], references: Sequence[References]) -> dict[str, list[int]]:
    """{tokens of the concepts that prompts name: numbers of these prompts}."""
    rows_of = _rows_of(prompts, references).items()
    return {" + ".join(references[c].token or f"concept {c}" for c in concepts): rows for concepts, rows in rows_of}


def _rows_of(prompts: Sequence[str], references: Sequence[References]) -> dict[tuple[int, ...], list[int]]:
    """{numbers of the concepts that prompts name, or of all: numbers of these prompts}."""
    tokens = [(concept, of.token) for concept, of in enumerate(references) if of.token is not None]
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        named = tuple(concept for concept, token in tokens if names(prompt, token))
        rows_of.setdefault(named or tuple(range(len(references))), []).append(row)
    return rows_of


def _joined(parts: Sequence[Seen]) -> Seen:
    both = ([part.clip for part in parts], [part.vision for part in parts])
    return Seen(*(None if each[0] is None else torch.cat(each) for each in both))
