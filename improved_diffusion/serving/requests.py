"""What can be asked for: a dataclass for each kind of job, checked before it is queued; in the queue, plain values.

A new kind is a dataclass here, a line in KINDS, and a drawer in drawers.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from improved_diffusion.errors import UserError
from improved_diffusion.serving.config import LimitsConfig
from improved_diffusion.settings import require
from improved_diffusion.stickers.finish import require_outline
from improved_diffusion.stickers.prompt import CAPTION

NO_STYLE = "none"  # how users call the base without one
SURROGATE = re.compile("[\ud800-\udfff]")
LONG_LIST = 3000  # characters: a message of Telegram's has 4,096


@dataclass(frozen=True, kw_only=True)
class Request:
    """What all kinds have."""

    kind: ClassVar[str]
    n: int = 1
    """Images."""
    seed: int = 0
    """Image i is that of number i of this seed, as sample.py and personalize.py draw it."""
    steps: int = 25
    """Sampling steps."""

    @property
    def work(self) -> int:
        """How long it takes, in units of its kind: images times steps."""
        return self.n * self.steps

    @property
    def group(self) -> Hashable:
        """What requests that can be drawn at once have in common."""
        return (self.kind, self.steps)

    def most_steps(self, limits: LimitsConfig) -> int:
        return limits.steps

    def check(self, limits: LimitsConfig, offer: Mapping[str, Any]) -> None:
        """Raise UserError where it is out of bounds, or asks for what the worker, by its `offer`, has not."""
        require(self.kind in offer.get("kinds", ()), f"this server draws no {self.kind} jobs")
        require(1 <= self.n <= limits.images, f"1 to {limits.images} images at a time, not {self.n}")
        most = self.most_steps(limits)
        require(1 <= self.steps <= most, f"1 to {most} steps, not {self.steps}")
        require(0 <= self.seed < 2**62, f"the seed must be from 0 to 2^62, not {self.seed}")
        # Neither of them can be in a database's text.
        texts = [value for value in self.plain().values() if isinstance(value, str)]
        require(not any("\0" in text or SURROGATE.search(text) for text in texts), "the text has letters that are none")

    def plain(self) -> dict[str, Any]:
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class ClassRequest(Request):
    """Images of a class, by the pixel model."""

    kind = "class"
    class_name: str
    guidance_scale: float | None = None
    """By default as the model's own settings say."""

    @property
    def group(self) -> Hashable:
        return (self.kind, self.steps, self.guidance_scale)

    def check(self, limits: LimitsConfig, offer: Mapping[str, Any]) -> None:
        super().check(limits, offer)
        if self.guidance_scale is not None:
            _require_scale(self.guidance_scale)
            guided = self.guidance_scale != 1
            require(not guided or offer["can_be_guided"], "the model was not trained to be guided: leave scale 1")
        known = offer["classes"]
        require(self.class_name in known, f"there is no class {self.class_name!r}; there are: {listed(known)}")


@dataclass(frozen=True, kw_only=True)
class ProcessRequest(ClassRequest):
    """How one image of a class comes about: what the pixel model takes it to be at moments of the reverse process."""

    kind = "process"

    def check(self, limits: LimitsConfig, offer: Mapping[str, Any]) -> None:
        super().check(limits, offer)
        require(self.n == 1, f"one image at a time is shown coming about, not {self.n}")


@dataclass(frozen=True, kw_only=True)
class TextRequest(Request):
    """Pictures of a text, by the base or a style of it."""

    kind = "text"
    prompt: str
    style: str | None = None
    guidance_scale: float = 7.5
    negative_prompt: str = ""
    unet_scale: float = 1.0
    """How much the style weighs in the UNet: 0 is the base."""
    text_encoder_scale: float = 1.0
    """And in the text encoders."""

    @property
    def group(self) -> Hashable:
        scales = (self.guidance_scale, self.unet_scale, self.text_encoder_scale)
        return (self.kind, self.style, self.steps, self.negative_prompt, *scales)

    def check(self, limits: LimitsConfig, offer: Mapping[str, Any]) -> None:
        super().check(limits, offer)
        _require_scale(self.guidance_scale)
        require(bool(self.prompt.strip()), "what should it show? The prompt is empty")
        for text in (self.prompt, self.negative_prompt):
            require(len(text) <= limits.text, f"a prompt has at most {limits.text} letters, not {len(text)}")
        styles = offer["styles"]
        has = f"there are: {', '.join(styles)}" if styles else "there are none"
        require(self.style is None or self.style in styles, f"there is no style {self.style!r}; {has}")
        scales = {self.unet_scale, self.text_encoder_scale}
        require(all(0 <= scale <= 2 for scale in scales), f"a style weighs from 0 to 2, not {max(scales, key=abs)}")
        require(self.style is not None or scales == {1.0}, "the scales weigh a style: choose one, or leave them at 1")


@dataclass(frozen=True, kw_only=True)
class ImageRequest(TextRequest):
    """Pictures of a text that start from a picture."""

    kind = "image"
    upload: str
    """Of the picture: see uploads.py."""
    strength: float = 0.6
    """0 leaves the picture, 1 forgets it."""

    @property
    def group(self) -> Hashable:
        return (*super().group, self.upload, self.strength)

    def check(self, limits: LimitsConfig, offer: Mapping[str, Any]) -> None:
        super().check(limits, offer)
        require(0 < self.strength <= 1, f"the strength must be above 0 and at most 1, not {self.strength}")
        require(
            int(self.steps * self.strength) >= 1,
            f"strength {self.strength} leaves none of {self.steps} steps: raise one of them",
        )


@dataclass(frozen=True, kw_only=True)
class StickerRequest(Request):
    """A sticker of a picture: its foreground, as it is or drawn anew before."""

    kind = "sticker"
    upload: str
    """Of the picture: see uploads.py."""
    restyle: bool = True
    """Draw it anew, where that can be done; see `redraws`."""
    prompt: str = ""
    """What to make of it, in which {caption} stands for what the picture shows; empty for the caption."""
    style: str | None = None
    guidance_scale: float = 7.5
    strength: float = 0.6
    """0 leaves the picture, 1 forgets it."""
    outline: int = 10
    """Width of a white outline in pixels of the sticker."""

    @property
    def work(self) -> int:
        return 1 + int(self.steps * self.strength) if self.restyle else 1

    @property
    def group(self) -> Hashable:
        return self  # nothing is saved by drawing several at once

    def redraws(self, has_base: bool, captions: bool) -> bool:
        """Whether a server that has a base, and one that captions, draws the picture anew; else it only cuts it out."""
        return self.restyle and has_base and (captions or bool(self.prompt.strip()))

    def as_image(self) -> ImageRequest:
        """The picture that is drawn before anything is cut out."""
        how = {name: getattr(self, name) for name in ("seed", "steps", "upload", "style", "guidance_scale", "strength")}
        return ImageRequest(prompt=self.prompt.strip() or CAPTION, **how)

    def check(self, limits: LimitsConfig, offer: Mapping[str, Any]) -> None:
        super().check(limits, offer)
        has_base, captions = "image" in offer["kinds"], offer.get("captions", False)
        require(self.n == 1, f"one sticker at a time is made of a picture, not {self.n}")
        require_outline(self.outline)
        if self.redraws(has_base, captions):
            self.as_image().check(limits, offer)
            require(captions or CAPTION not in self.prompt, f"nobody here says what it shows: do so for {CAPTION}")
        elif self.restyle:
            require(not self.prompt.strip(), "this server only cuts out: leave the prompt out")


@dataclass(frozen=True, kw_only=True)
class TuneRequest(Request):
    """A style of the user's own, learned from pictures: a LoRA run of personalize.py on the base. It is the user's
    alone, under its name, as long as the job is kept."""

    kind = "tune"
    name: str
    """Under which prompts may then ask for it."""
    uploads: tuple[str, ...]
    """Of the pictures: see uploads.py."""
    class_name: str
    """What they show: dog, sticker, ...; in prompts {class}."""
    token: str = "sks"
    """A rare word, for what is special about it; in prompts {token}."""
    steps: int = 400
    """Updates."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "uploads", tuple(self.uploads))  # a list, from the queue

    @property
    def group(self) -> Hashable:
        return (self.kind, self.name, self.uploads)  # its own: a user has one style of a name

    def most_steps(self, limits: LimitsConfig) -> int:
        return limits.tune_steps

    def check(self, limits: LimitsConfig, offer: Mapping[str, Any]) -> None:
        super().check(limits, offer)
        require(self.n == 1, f"one style at a time is learned, not {self.n}")
        name, most = self.name, limits.tune_pictures
        require(
            name.isidentifier() and len(name) <= 30, f"a style's name is up to 30 letters, digits and _, not {name!r}"
        )
        require(
            name != NO_STYLE and name not in offer["styles"], f"there is a style {name!r} already: choose another name"
        )
        for word in (self.class_name, self.token):
            require(bool(word.strip()) and len(word) <= 30, f"what is it? A word like dog or sticker, not {word!r}")
        count = len(self.uploads)
        require(1 <= count <= most, f"a style is learned from 1 to {most} pictures, not {count}: send them first")


KINDS: dict[str, type[Request]] = {
    kind.kind: kind for kind in (ClassRequest, ProcessRequest, TextRequest, ImageRequest, StickerRequest, TuneRequest)
}


def request_of(plain: Mapping[str, Any]) -> Request:
    """The request whose `plain` form was queued."""
    values = dict(plain)
    kind = values.pop("kind")
    if kind not in KINDS:
        raise UserError(f"this version knows no jobs of the kind {kind!r}")
    return KINDS[kind](**values)


def uploads_in(plain: Mapping[str, Any]) -> set[str]:
    """The uploads that a request in its `plain` form needs."""
    return {*plain.get("uploads", ()), *filter(None, [plain.get("upload")])}


def listed(names: Sequence[str]) -> str:
    """All names, or as many as fit into a message, and how many are left out."""
    kept = list(names)
    while len(text := ", ".join(kept)) > LONG_LIST:
        kept.pop()
    return text if len(kept) == len(names) else f"{text} and {len(names) - len(kept):,} more"


def _require_scale(scale: float) -> None:
    require(0 <= scale <= 50, f"the guidance scale must be from 0 to 50, not {scale}")
