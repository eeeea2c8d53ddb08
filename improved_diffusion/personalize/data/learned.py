"""The images of a run: those it trains on and those held out, each with the text that it is learned with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from improved_diffusion.diffusion.noise import seeded_generator
from improved_diffusion.personalize.config import PersonalizeConfig
from improved_diffusion.personalize.data.captioned import CaptionedImage, CaptionedSet, open_captioned_set
from improved_diffusion.personalize.data.masks import with_masks
from improved_diffusion.personalize.data_config import escape_braces
from improved_diffusion.settings import require

HELD_OUT = 300  # purpose of a generator, see training/trainer.py


@dataclass(frozen=True)
class Captioned:
    """Images, and the texts that each is learned with, as a rule one."""

    images: tuple[CaptionedImage, ...]
    wordings: tuple[tuple[str, ...], ...]
    concepts: tuple[int, ...]  # to which of the run's concepts each belongs

    def of(self, concept: int) -> Captioned:
        """Those of one concept."""
        rows = [row for row, own in enumerate(self.concepts) if own == concept]
        return Captioned(
            *(tuple(column[row] for row in rows) for column in (self.images, self.wordings, self.concepts))
        )

    @property
    def texts(self) -> tuple[str, ...]:
        """The first text of each image."""
        return tuple(texts[0] for texts in self.wordings)


@dataclass(frozen=True)
class Learned:
    """The images of a run."""

    training: Captioned
    held_out: Captioned
    skipped: tuple[str, ...]  # what could not be used: one line each
    content_hash: str  # of all images, captions and masks


def open_images(config: PersonalizeConfig) -> Learned:
    """The images of all concepts of `config`, with their texts.

    Raises:
        UserError: no images, a missing caption where there is no subject to name instead, all of them held out, or a
            mask that will not do.
    """
    opened = [_open(part, concept) for concept, part in enumerate(config.parts)]
    if len(opened) == 1:
        return opened[0]
    training, held_out = (
        Captioned(
            tuple(image for part in parts for image in part.images),
            tuple(texts for part in parts for texts in part.wordings),
            tuple(concept for part in parts for concept in part.concepts),
        )
        for parts in zip(*((part.training, part.held_out) for part in opened), strict=True)
    )
    skipped = tuple(line for part in opened for line in part.skipped)
    digest = hashlib.sha256("".join(part.content_hash for part in opened).encode())
    return Learned(training, held_out, skipped, digest.hexdigest())


def _open(config: PersonalizeConfig, concept: int) -> Learned:
    require(config.data is not None, "which images? give --data, a folder or a parquet file")
    found = open_captioned_set(
        config.data,
        background=config.images.background,
        captions_required=config.subject.token is None,
        caption_column=config.images.caption_column,
    )
    found = with_masks(found, config.images)
    count = config.images.held_out
    require(count < len(found), f"images.held_out is {count}, and there are {len(found)} images in {config.data}")
    order = torch.randperm(len(found), generator=seeded_generator(config.seed, HELD_OUT)).tolist()
    held_out = set(order[:count])
    training, apart = (
        tuple(image for i, image in enumerate(found.images) if (i in held_out) == is_apart)
        for is_apart in (False, True)
    )
    learned = (_with_texts(images, config, concept) for images in (training, apart))
    return Learned(*learned, found.skipped, _content_hash(found))


def _with_texts(images: tuple[CaptionedImage, ...], config: PersonalizeConfig, concept: int) -> Captioned:
    """Each with its captions, or else with the subject's prompt."""
    subject = config.subject

    def texts(image: CaptionedImage) -> tuple[str, ...]:
        if image.caption is None or not config.images.captions:
            return (subject.fill(subject.prompt),)
        captions = (image.caption, *image.other_captions)
        if subject.token is not None:
            captions = tuple(map(escape_braces, captions))
        if subject.caption_prompt is not None:
            captions = tuple(subject.caption_prompt.replace("{caption}", caption) for caption in captions)
        return captions if subject.token is None else tuple(map(subject.fill, captions))

    return Captioned(images, tuple(texts(image) for image in images), (concept,) * len(images))


def _content_hash(found: CaptionedSet) -> str:
    digest = hashlib.sha256()
    for image in found.images:
        digest.update(hashlib.sha256(image.read()).digest())
        for caption in (image.caption or "", *image.other_captions):
            digest.update(caption.encode() + b"\0")
        if image.mask is not None:
            digest.update(image.mask().tobytes())
    return digest.hexdigest()
