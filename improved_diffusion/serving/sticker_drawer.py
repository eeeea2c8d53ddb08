"""Stickers of pictures, as `stickers.py make` makes them: caption, draw anew, cut out, finish."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from PIL import Image

from improved_diffusion.config import PRETRAINED
from improved_diffusion.runtime.devices import usable_device
from improved_diffusion.serving.config import ServingConfig
from improved_diffusion.serving.device import OnProgress, release_memory
from improved_diffusion.serving.records import Encoded
from improved_diffusion.serving.requests import StickerRequest
from improved_diffusion.serving.uploads import open_upload
from improved_diffusion.stickers.cut import cut_out
from improved_diffusion.stickers.finish import encode, finish
from improved_diffusion.stickers.matte import SHIPPED, Matter, load_matter
from improved_diffusion.stickers.prompt import CAPTION

if TYPE_CHECKING:
    from improved_diffusion.serving.text_drawer import TextDrawer

FORMAT = "webp"
SHARE = 0.9  # of the time that drawing anew takes

Captioner = Callable[[Image.Image], str]


class StickerDrawer:
    """One sticker after the other.

    Args:
        config: of the server.
        matter: what tells the foreground from the background.
        text: what draws pictures anew; without it they are only cut out.
        captioner: what says what a picture shows.
    """

    def __init__(self, config: ServingConfig, matter: Matter, text: TextDrawer | None, captioner: Captioner | None):
        self.config = config
        self.matter = matter
        self.text = text
        self.captioner = captioner

    def draw(self, requests: Sequence[StickerRequest], on_progress: OnProgress) -> list[list[Encoded]]:
        return [[self._sticker(requests[0], on_progress)]] * len(requests)  # those of one group are equal

    def release(self) -> None:
        if self.text is not None:
            self.text.release()
        release_memory()

    def _sticker(self, request: StickerRequest, on_progress: OnProgress) -> Encoded:
        picture = open_upload(self.config, request.upload)
        if request.redraws(self.text is not None, self.captioner is not None):
            picture = self._redrawn(picture, request, lambda part: on_progress(SHARE * part))
        on_progress(SHARE)
        sticker = finish(cut_out(picture, self.matter), request.outline)
        return Encoded(encode(sticker, FORMAT), f".{FORMAT}")

    def _redrawn(self, picture: Image.Image, request: StickerRequest, on_step: OnProgress) -> Image.Image:
        from improved_diffusion.personalize.generate import Sampling  # with diffusers, which takes seconds
        from improved_diffusion.stickers.restyle import Style, restyle

        sampling = Sampling(request.steps, request.guidance_scale, strength=request.strength)
        run = self.text.choose_style(request.as_image())
        style = Style(self.text.base, run, sampling, request.seed, request.prompt.strip() or None)
        captioned = self.captioner is not None and CAPTION in style.prompt_template
        return restyle(style, picture, self.captioner(picture) if captioned else None, on_step)


def open_sticker_drawer(config: ServingConfig, text: TextDrawer | None) -> StickerDrawer:
    """That of the models of the settings.

    Raises:
        UserError: what is to cut out, or to caption, cannot be loaded.
    """
    models = config.models
    matter = load_matter(SHIPPED if models.matting == PRETRAINED else models.matting, models.device)
    captioner = None if models.captioner is None else open_captioner(models.captioner, models.device)
    return StickerDrawer(config, matter, text, captioner)


def open_captioner(name: str, device: str | None) -> Captioner:
    """BLIP. Raises UserError as `load_blip` does."""
    from improved_diffusion.personalize.data.captioning import describe
    from improved_diffusion.personalize.models.judges import load_blip

    model, processor = load_blip(name, usable_device(device), "--models.captioner")
    return lambda picture: describe([picture], model, processor)[0]
