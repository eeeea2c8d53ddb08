"""Settings of what a run learns from: its images, their texts and how these are read, the subject, and the prior.

In prompts, `{token}` and `{class}` stand for the subject's.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from improved_diffusion.errors import UserError
from improved_diffusion.settings import require

FILLED = ("token", "class")  # what stands in braces in a prompt
LONGEST_TEXT = 225  # tokens


@dataclass(frozen=True)
class ImagesConfig:
    """How the images to learn from are treated."""

    captions: bool = True
    """Use the captions that come with the images; an image without one gets the subject's prompt."""
    caption_column: str | None = None
    """Column of the captions in metadata or parquet; by default a usual name is looked for."""
    background: str = "white"
    """Colour under transparent images: a name or #rrggbb."""
    resolution: int | None = None
    """Pixels a side (with buckets: of a square of equal area); by default what the base was made for."""
    buckets: bool = False
    """Train at sizes of several aspect ratios instead of squares alone."""
    crops: int = 1
    """Crops of each image, evenly along its longer side; 1 is the centre."""
    flip: bool = False
    """Each crop mirrored as well."""
    repeats: int = 1
    """Times that each image is seen in an epoch."""
    held_out: int = 0
    """Images kept from training, of each concept, to measure the loss on."""
    caption_dropout: float = 0.0
    """Probability that an image is learned without its caption. 0.05 to 0.1 is usual."""
    shuffle_tags: bool = False
    """Bring what stands between the commas of a caption into another order at each sight."""
    keep_tags: int = 1
    """Of these, how many stay in front."""
    masked_loss: bool = False
    """Learn what masks show: white counts, black does not, grey in part. That of a.jpg is a.mask.png beside it."""
    conditioning_data_dir: str | None = None
    """Folder in which masks lie instead, under the names of their images, as kohya's scripts want it."""
    alpha_mask: bool = False
    """Take an image's own transparency for its mask."""
    cache: bool = True
    """Keep latents and text embeddings, in memory and from run to run on disk, instead of encoding at every step."""
    cache_folder: str | None = None
    """Where on disk; by default with all else that is kept from run to run."""

    def __post_init__(self) -> None:
        for name in ("crops", "repeats"):
            require(getattr(self, name) >= 1, f"images.{name} must be at least 1, not {getattr(self, name)}")
        require(
            0 <= self.caption_dropout <= 1,
            f"images.caption_dropout must be between 0 and 1, not {self.caption_dropout}",
        )
        require(self.keep_tags >= 0, f"images.keep_tags must not be negative, not {self.keep_tags}")
        require(
            self.masked_loss or self.conditioning_data_dir is None,
            "images.conditioning_data_dir is of masks: set images.masked_loss true, or leave it out",
        )
        require(
            not (self.masked_loss and self.alpha_mask),
            "images.masked_loss takes masks from files and images.alpha_mask from the images: set one of them",
        )
        require(self.held_out >= 0, f"images.held_out must not be negative, not {self.held_out}")
        require(
            self.resolution is None or (self.resolution >= 8 and self.resolution % 8 == 0),
            f"images.resolution must be a multiple of 8, not {self.resolution}",
        )

    @property
    def has_masks(self) -> bool:
        return self.masked_loss or self.alpha_mask


@dataclass(frozen=True)
class SubjectConfig:
    """What a prompt calls the subject (DreamBooth, textual inversion)."""

    token: str | None = None
    """The rare token; with textual inversion the new word."""
    class_name: str | None = None
    """What kind of thing it is: dog, sticker, ..."""
    prompt: str = "a photo of {token} {class}"
    """Text of the images that have no caption."""
    caption_prompt: str | None = None
    """Text of those that have one, which stands for {caption} in it, so that every caption names the subject:
    "{token} {class}, {caption}"; null for the caption as it is."""
    allow_split_token: bool = False
    """Take a token that a tokenizer splits, a name say, though its pieces have meanings of their own."""
    vectors: int = 1
    """Textual inversion: embeddings that the new word stands for."""

    def __post_init__(self) -> None:
        require(self.vectors >= 1, f"subject.vectors must be at least 1, not {self.vectors}")
        require(
            self.caption_prompt is None or "{caption}" in self.caption_prompt,
            f"subject.caption_prompt {self.caption_prompt!r} has no {{caption}} for the caption",
        )

    def fill(self, template: str) -> str:
        """The prompt, with the token and the class in their places.

        Raises:
            UserError: it asks for one that is not set, or for something else.
        """
        try:
            text = "".join(self._parts(template))
        except KeyError as error:
            advice = "only {token} and {class} can be filled in"
            if error.args[0] in FILLED:
                advice = "set subject.token and subject.class_name, or a concept's own (a run has them)"
            raise UserError(f"the prompt {template!r} needs {{{error.args[0]}}}: {advice}") from error
        except (ValueError, IndexError, AttributeError) as error:
            raise UserError(f"the prompt {template!r} cannot be filled in: {error}") from error
        return " ".join(text.split())

    def _parts(self, template: str) -> Iterator[str]:
        """Not by str.format, which whoever writes a prompt could tell to fill the memory: {token:>1000000000}."""
        values = _Set({"token": self.token, "class": self.class_name})
        for literal, name, form, conversion in string.Formatter().parse(template):
            yield literal
            if form or conversion:
                raise ValueError(f"{{{name}}} takes no format")
            if name is not None:
                yield values[name]


def escape_braces(caption: str) -> str:
    """A template of which `fill` makes the caption again, with its {token} and {class} filled in: other braces are
    text, as those by which tags are weighed."""
    return re.sub(r"\{(token|class)\}|[{}]", lambda found: found[0] if found[1] else found[0] * 2, caption)


class _Set(dict):
    """Of which what is None is as good as missing."""

    def __getitem__(self, name: str) -> str:
        value = super().__getitem__(name)
        if value is None:
            raise KeyError(name)
        return value


@dataclass(frozen=True)
class PriorConfig:
    """Images of the class, which the base draws, trained on beside the subject so that the class is not forgotten."""

    images: int = 0
    """How many; 0 for none."""
    weight: float = 1.0
    """Of their loss."""
    prompt: str = "a photo of a {class}"
    """What they show."""
    path: str | None = None
    """Folder in which they are kept, or a folder of one's own images; by default one in the cache."""
    steps: int = 50
    """Sampling steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance."""

    def __post_init__(self) -> None:
        require(self.images >= 0, f"prior.images must not be negative, not {self.images}")
        require(self.weight >= 0, f"prior.weight must not be negative, not {self.weight}")
        require(self.steps >= 1, f"prior.steps must be at least 1, not {self.steps}")


@dataclass(frozen=True)
class ConceptConfig:
    """One of several things that a run learns. What is null is as in the groups `subject`, `prior` and `images`."""

    data: str
    """Its images: a folder or a parquet file."""
    token: str | None = None
    """Its rare token."""
    class_name: str | None = None
    """What kind of thing it is."""
    prompt: str | None = None
    """Text of its images that have no caption."""
    repeats: int | None = None
    """Times that each of its images is seen in an epoch."""
    class_prompt: str | None = None
    """What the images of its prior show."""
    class_images: int | None = None
    """How many they are; 0 for none."""
    class_data_dir: str | None = None
    """Their folder; by default one in the cache."""
    conditioning_data_dir: str | None = None
    """Folder of its masks, with images.masked_loss; by default they lie beside its images."""


@dataclass(frozen=True)
class TextConfig:
    """How texts are read, in training and wherever the run draws."""

    clip_skip: int = 1
    """Which layer of the text encoder the UNet is told, from the end, as in kohya's scripts: 1 is the last, 2 the one
    before it. SDXL counts from the layer before the last of each of its two. In diffusers it is 1 less."""
    max_token_length: Literal[75, 150, 225] = 75
    """Tokens of a text that are read, 75 at a time; what is longer is cut."""

    def __post_init__(self) -> None:
        require(self.clip_skip >= 1, f"text.clip_skip must be at least 1, the last layer, not {self.clip_skip}")
