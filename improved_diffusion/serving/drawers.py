"""What draws each kind of job, with the models of the settings: a class each, and a line in `open_drawers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from improved_diffusion.config import PRETRAINED, SamplingConfig
from improved_diffusion.errors import UserError
from improved_diffusion.sampling.generate import SampleKey
from improved_diffusion.sampling.loading import load
from improved_diffusion.sampling.model import Model, change_sampling
from improved_diffusion.sampling.strip import reverse_process
from improved_diffusion.serving.config import ModelsConfig, ServingConfig
from improved_diffusion.serving.device import Drawer, Learner, OnProgress, release_memory
from improved_diffusion.serving.requests import ClassRequest, ProcessRequest
from improved_diffusion.stickers.matte import SHIPPED

SAMPLER = "dpmpp_2m"
MOMENTS = 25  # of a reverse process that are shown


def open_drawers(config: ServingConfig) -> tuple[dict[str, Drawer | Learner], dict[str, Any]]:
    """{kind: what draws it}, of the models of the settings; and what clients are told of them.

    Raises:
        UserError: a model that cannot be loaded, or none at all.
    """
    models = config.models
    drawers: dict[str, Drawer | Learner] = {}
    offer: dict[str, Any] = {"classes": [], "can_be_guided": False, "styles": []}
    if models.pixel is not None:
        model = load(models.pixel, device=models.device)
        drawers["class"] = PixelDrawer(model, models.batch_size)
        drawers["process"] = ProcessDrawer(model, models.batch_size)
        offer |= {
            "classes": list(model.row_names),
            "can_be_guided": model.config.model.class_dropout > 0,
            "guidance_scale": model.config.sampling.guidance_scale,
        }
    if models.text_base is not None:
        from improved_diffusion.serving.text_drawer import open_text_drawer  # diffusers takes seconds

        drawers["text"] = drawers["image"] = open_text_drawer(config)
        offer["styles"] = list(models.styles)
        if models.tunes:
            from improved_diffusion.serving.tuner import Tuner

            drawers["tune"] = Tuner(config)
    if cuts_out(models):
        from improved_diffusion.serving.sticker_drawer import open_sticker_drawer  # so does transformers

        drawers["sticker"] = open_sticker_drawer(config, drawers.get("image"))
        offer["captions"] = models.captioner is not None
    if not drawers:
        raise UserError("there is nothing to draw with: name models.pixel, models.base, or both (serve.py init)")
    return drawers, {"kinds": list(drawers), **offer}


def cuts_out(models: ModelsConfig) -> bool:
    """Whether there is something that cuts stickers out: a copy of the project may lack the cut-out that ships."""
    return models.matting is not None and (models.matting != PRETRAINED or SHIPPED.exists())


class PixelDrawer:
    """Images of classes, as sample.py draws them, of one model."""

    def __init__(self, model: Model, batch_size: int):
        self.model = model
        self.batch_size = batch_size

    def draw(self, requests: Sequence[ClassRequest], on_progress: OnProgress) -> list[list[Image.Image]]:
        first, sampling = requests[0], self._sampling(requests[0])
        keys = [key for request in requests for key in self._keys(request)]
        drawn: list[np.ndarray] = []

        def on_step(step: int, _: object) -> None:  # counts down to 0
            batch = min(self.batch_size, len(keys) - len(drawn))
            on_progress((len(drawn) + batch * (1 - step / first.steps)) / len(keys))

        for _, images in self.model.draw(keys, sampling, on_step=on_step):
            drawn.extend(images)
        pictures = iter(map(as_picture, drawn))
        return [[next(pictures) for _ in range(request.n)] for request in requests]

    def release(self) -> None:
        release_memory()

    def _sampling(self, request: ClassRequest) -> SamplingConfig:
        how = {"steps": request.steps, "guidance_scale": request.guidance_scale, "batch_size": self.batch_size}
        return change_sampling(self.model.config.sampling, sampler=SAMPLER, **how)

    def _keys(self, request: ClassRequest) -> list[SampleKey]:
        classes = request.class_name if self.model.config.model.class_conditional else None
        return self.model.keys(classes, request.n, request.seed)


class ProcessDrawer(PixelDrawer):
    """How an image comes about: the estimates of it, the last of which is the image."""

    def draw(self, requests: Sequence[ProcessRequest], on_progress: OnProgress) -> list[list[Image.Image]]:
        first = requests[0]
        keys = [key for request in requests for key in self._keys(request)]
        done = 0

        def on_step(_: int) -> None:
            nonlocal done
            done += 1
            on_progress(min(1.0, done / first.steps))

        estimates, _ = reverse_process(self.model, keys, self._sampling(first), MOMENTS, on_step)
        return [list(map(as_picture, of_one)) for of_one in estimates]


def as_picture(image: np.ndarray) -> Image.Image:
    """uint8 (H, W, C) for PIL; of one channel grey."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
