"""Text-to-image and image-to-image: one base on the device, and of its styles those that were asked for last."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import PersonalizeConfig
from improved_diffusion.personalize.generate import Sampling, draw
from improved_diffusion.personalize.models.adapters import choose_adapters, remove_adapters, set_scales
from improved_diffusion.personalize.models.base import Base, load_base
from improved_diffusion.personalize.models.trained import resolution_of
from improved_diffusion.personalize.models.tuned import attach_run, lora_config
from improved_diffusion.run_directory import RunDirectory, is_run_directory
from improved_diffusion.runtime.devices import drawing_precision, usable_device
from improved_diffusion.serving.config import ServingConfig
from improved_diffusion.serving.device import OnProgress, release_memory
from improved_diffusion.serving.requests import ImageRequest, TextRequest
from improved_diffusion.serving.tuner import run_of
from improved_diffusion.serving.uploads import open_upload


class AdapterCache:
    """The adapters of several runs on one base, on its device, the least recently used leaving first.

    Args:
        base: without adapters.
        runs: {name: run of personalize.py}.
        limit: bytes that they may take together; the one in use stays whatever it takes.
        find: gives the run of any other name, which may lie there or not.

    Raises:
        UserError: a run that is none, or trained no adapters.
    """

    def __init__(
        self,
        base: Base,
        runs: Mapping[str, RunDirectory],
        limit: int,
        find: Callable[[str], RunDirectory] | None = None,
    ):
        self.base = base
        self.runs = dict(runs)
        self.limit = limit
        self.find = find
        self._kept: OrderedDict[str, tuple[PersonalizeConfig, int]] = OrderedDict()
        for run in self.runs.values():
            lora_config(run)

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self._kept.values())

    def use(self, name: str | None) -> PersonalizeConfig:
        """Let the base draw in a style, or without one; returns the settings of its run.

        Raises:
            UserError: there is no such style; or see `attach_run`.
        """
        if name is None:
            choose_adapters(self.base)
            return PersonalizeConfig()
        run = self.runs.get(name)
        if run is None and self.find is not None and is_run_directory(self.find(name).path):
            run = self.find(name)
        if run is None:  # it was removed, or the settings were changed since
            raise UserError(f"there is no style {name!r} any more")
        if name not in self._kept:
            self._kept[name] = attach_run(self.base, run, name)
        self._kept.move_to_end(name)
        while self.nbytes > self.limit and len(self._kept) > 1:
            self._remove(next(iter(self._kept)))
        choose_adapters(self.base, name)
        return self._kept[name][0]

    def clear(self) -> None:
        for name in list(self._kept):
            self._remove(name)

    def _remove(self, name: str) -> None:
        del self._kept[name]
        remove_adapters(self.base, name)


class TextDrawer:
    """Pictures as `personalize.py generate` draws them, of a base and its styles."""

    def __init__(self, base: Base, styles: AdapterCache, config: ServingConfig):
        self.base = base
        self.styles = styles
        self.config = config

    def draw(self, requests: Sequence[TextRequest], on_progress: OnProgress) -> list[list[Image.Image]]:
        first = requests[0]
        run = self.choose_style(first)
        side = resolution_of(run, self.base)
        sampling = Sampling(first.steps, first.guidance_scale, first.negative_prompt, side, side)
        start = None
        if isinstance(first, ImageRequest):
            sampling = dataclasses.replace(sampling, strength=first.strength)
            start = open_upload(self.config, first.upload)
        prompts = [run.subject.fill(request.prompt) for request in requests for _ in range(request.n)]
        seeds = [request.seed + i for request in requests for i in range(request.n)]
        drawn = draw(self.base, prompts, seeds, sampling, self.config.models.batch_size, start, on_progress)
        pictures = iter(list(drawn))
        return [[next(pictures) for _ in range(request.n)] for request in requests]

    def choose_style(self, request: TextRequest) -> PersonalizeConfig:
        """Let the base draw in a request's style, as much as it weighs; returns the settings of the style's run."""
        run = self.styles.use(request.style)
        self.base = dataclasses.replace(self.base, text=run.text)
        if request.style is not None:
            set_scales(self.base, request.unet_scale, request.text_encoder_scale, name=request.style)
        return run

    def release(self) -> None:
        """Adapters; and from now on latents are decoded one by one."""
        self.styles.clear()
        self.base.pipeline.vae.enable_slicing()
        release_memory()


def open_text_drawer(config: ServingConfig) -> TextDrawer:
    """That of the models of the settings.

    Raises:
        UserError: the base cannot be loaded, or a style is no LoRA run.
    """
    models = config.models
    device = usable_device(models.device)
    base = load_base(models.text_base).to(device, drawing_precision(device))
    runs = {name: RunDirectory(Path(path)) for name, path in models.styles.items()}
    own = functools.partial(run_of, config.results)
    return TextDrawer(base, AdapterCache(base, runs, models.adapter_bytes, own), config)
