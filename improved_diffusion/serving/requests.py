"""What can be asked for: a dataclass for each kind of job, checked before it is queued; in the queue, plain values.

A new kind is a dataclass here, a line in KINDS, and a drawer in drawers.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from improved_diffusion.errors import UserError
from improved_diffusion.serving.config import LimitsConfig
from improved_diffusion.settings import require


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

    def check(self, limits: LimitsConfig, offer: Mapping[str, Any]) -> None:
        """Raise UserError where it is out of bounds, or asks for what the worker, by its `offer`, has not."""
        require(self.kind in offer.get("kinds", ()), f"this server draws no {self.kind} jobs")
        require(1 <= self.n <= limits.images, f"1 to {limits.images} images at a time, not {self.n}")
        require(1 <= self.steps <= limits.steps, f"1 to {limits.steps} steps, not {self.steps}")
        require(0 <= self.seed < 2**62, f"the seed must be from 0 to 2^62, not {self.seed}")

    def plain(self) -> dict[str, Any]:
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class ClassRequest(Request):
    """Images of a class, by the pixel model."""

    kind = "class"
    class_name: str
    guidance_scale: float = 1.0

    @property
    def group(self) -> Hashable:
        return (self.kind, self.steps, self.guidance_scale)

    def check(self, limits: LimitsConfig, offer: Mapping[str, Any]) -> None:
        super().check(limits, offer)
        _require_scale(self.guidance_scale)
        require(
            self.guidance_scale == 1 or offer["can_be_guided"], "the model was not trained to be guided: leave scale 1"
        )
        known = offer["classes"]
        require(self.class_name in known, f"there is no class {self.class_name!r}; there are: {', '.join(known)}")


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


KINDS: dict[str, type[Request]] = {
    kind.kind: kind for kind in (ClassRequest, ProcessRequest, TextRequest, ImageRequest)
}


def request_of(plain: Mapping[str, Any]) -> Request:
    """The request whose `plain` form was queued."""
    values = dict(plain)
    kind = values.pop("kind")
    if kind not in KINDS:
        raise UserError(f"this version knows no jobs of the kind {kind!r}")
    return KINDS[kind](**values)


def _require_scale(scale: float) -> None:
    require(0 <= scale <= 50, f"the guidance scale must be from 0 to 50, not {scale}")
