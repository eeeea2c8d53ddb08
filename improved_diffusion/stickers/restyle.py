"""Photographs drawn anew in a learned style: image-to-image with a base, tuned or not."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from improved_diffusion.personalize.config import PersonalizeConfig
from improved_diffusion.personalize.data.crops import buckets, choose_bucket
from improved_diffusion.personalize.generate import Sampling, draw
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.models.trained import resolution_of
from improved_diffusion.stickers.photos import Outcome, Photo, make_each, png
from improved_diffusion.stickers.prompt import default_template, fill


@dataclass(frozen=True)
class Style:
    """What draws, and how."""

    base: Base  # tuned or not, on its device
    config: PersonalizeConfig  # of its run; the defaults, if it comes from none
    sampling: Sampling  # its height and width are not looked at
    seed: int
    template: str | None = None  # of prompts; by default one that suits the run

    @property
    def prompt_template(self) -> str:
        return self.template or default_template(self.config.subject)


def restyle(style: Style, photo: Image.Image, caption: str | None) -> Image.Image:
    """A picture of the photograph's shape, as nearly as the sizes that networks take have it, and of at most the area
    of the squares that the base draws.

    Args:
        style: what draws, and how.
        photo: RGB.
        caption: what the photograph shows.

    Raises:
        UserError: the template asks for something that is not there, or what is drawn is no picture.
    """
    prompt = fill(style.prompt_template, caption, style.config.subject)
    resolution = resolution_of(style.config, style.base)
    height, width = choose_bucket(*photo.size, buckets(resolution, elongated=True))
    sampling = dataclasses.replace(style.sampling, height=height, width=width)
    return next(draw(style.base, [prompt], [style.seed], sampling, start=photo))


def restyle_photos(
    photos: Sequence[Photo], out: Path, style: Style, captions: Mapping[str, str], model: Mapping[str, Any]
) -> Outcome:
    """Write out/NAME.png for each photograph; see `make_each`.

    Args:
        captions: {name: what the photograph shows}, of those that have one.
        model: what of the model changes its pictures, beside its settings here.

    Raises:
        UserError: as `make_each` does.
    """

    def captioned(photo: Photo) -> Photo:
        digest = hashlib.sha256(f"{photo.digest} {captions.get(photo.name)}".encode()).hexdigest()
        return dataclasses.replace(photo, digest=digest)

    def make(photo: Photo) -> bytes:
        return png(restyle(style, photo.load(), captions.get(photo.name)))

    settings = {"prompt": style.prompt_template, "seed": style.seed, **dataclasses.asdict(style.sampling), **model}
    return make_each([captioned(photo) for photo in photos], out, ".png", settings, make, "drawing")
