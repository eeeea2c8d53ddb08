"""A trained model, and what can be asked of it."""

from __future__ import annotations

import dataclasses
import difflib
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from improved_diffusion.config import Config, SamplingConfig
from improved_diffusion.diffusion.denoiser import Denoiser, Network, Prediction
from improved_diffusion.diffusion.samplers import OnStep
from improved_diffusion.errors import UserError
from improved_diffusion.models.backbone import Backbone
from improved_diffusion.models.build import build_denoiser, build_sampling_denoiser, number_of_steps
from improved_diffusion.progress import progress
from improved_diffusion.runtime.devices import arithmetic, with_autocast
from improved_diffusion.sampling.generate import SEEDS, SampleKey, generate, sampling_record
from improved_diffusion.settings import settings_of, to_plain

ROW_OF_ALL = "images"  # what stands for the class of a model that has none


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What is known of a trained model beside its weights."""

    config: Config = field(repr=False)
    """All settings that it was trained with; `config.sampling` is how it draws where nothing else is said."""
    class_names: tuple[str, ...] = field(repr=False)
    """In the order of the class indices."""
    step: int
    """Optimizer steps of its training."""
    ema_rate: float | None = None
    """Of the moving average that the weights are; None: of none, or of one that was made after training."""
    ema_length: float | None = None
    """Relative length of the average of the weights, where it was made after training."""
    selected_on: dict[str, Any] | None = field(default=None, repr=False)
    """How it was chosen among the checkpoints of its run, where it was (see `series.selection`)."""
    provenance: dict[str, Any] = field(default_factory=dict, repr=False)
    """Where it comes from: the run, the checkpoint, and what the run records of its training (commit, data, ...)."""


@dataclass(frozen=True, kw_only=True)
class Model(ModelCard):
    """A trained network in evaluation mode, with what is needed to draw images from it. `improved_diffusion.load`
    makes it."""

    network: Backbone = field(repr=False)
    """In float32, on `device`."""
    device: torch.device
    precision: str
    """What it is drawn in here: see `sampling_precision`."""
    checkpoint: Path
    """The file that it was loaded from."""
    checkpoint_sha256: str
    """Its hash when it was loaded: by now there may be another file, or none."""
    source: Path
    """What it is of: a run directory, or that file."""
    guide: Model | None = field(default=None, repr=False)
    """A worse model of the same images, for autoguidance."""

    @property
    def name(self) -> str:
        """That of the run directory or file."""
        return self.source.name.removesuffix(".safetensors")

    @property
    def row_names(self) -> tuple[str, ...]:
        """The names of its classes; one, `images`, for a model without classes."""
        return self.class_names if self.config.model.class_conditional else (ROW_OF_ALL,)

    def sample(
        self,
        classes: Sequence[str | int] | str | int | None = None,
        n: int = 1,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        options: Mapping[str, float] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guide: Model | None = None,
        noise: str | None = None,
        batch_size: int | None = None,
        show_progress: bool = True,
    ) -> np.ndarray:
        """Draw `n` images of each of `classes`: the same that sample.py draws.

        Args:
            classes: names or indices, or one of them; by default all.
            n: images of each class.
            seed: image number i of class c of seed s is the same picture whatever else is drawn beside it.
            steps: sampling steps; this and what follows is by default as `config.sampling` says.
            guidance_scale: 1 is none.
            sampler: ancestral, ddim, heun or dpmpp_2m. Another than the default one does not keep that one's spacing
                and options.
            spacing: of the steps over the noise levels: uniform, karras or log_snr.
            options: of the sampler: {"eta": 0.5}, for one.
            guidance_interval: noise levels, as sigma / signal, between which there is guidance.
            guide: a worse model, by which to be guided instead of by this one without the class.
            noise: numpy, or philox, which draws it on the device: other pictures, faster on a GPU.
            batch_size: images drawn at once; changes speed and memory only.
            show_progress: on standard error.

        Returns:
            uint8 (classes * n, H, W, C), class by class.

        Raises:
            UserError: no such class, settings that this model cannot follow, or a guide that does not fit.
        """
        model = self if guide is None else self.guided_by(guide)
        sampling = change_sampling(
            self.config.sampling,
            steps=steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            spacing=spacing,
            options=options,
            guidance_interval=guidance_interval,
            noise=noise,
            batch_size=batch_size,
        )
        keys = self.keys(classes, n, seed)
        return np.concatenate([images for _, images in model.draw(keys, sampling, show_progress=show_progress)])

    def keys(self, classes: Sequence[str | int] | str | int | None, n: int, seed: int) -> list[SampleKey]:
        """Those of `n` images of each of `classes` (see `sample`), class by class.

        Raises:
            UserError: no such class, fewer than one image, or a seed out of range.
        """
        if n < 1 or seed not in SEEDS:
            raise UserError(f"n must be at least 1 and the seed at least 0 and below 2^63, not {n} and {seed}")
        return [SampleKey(seed, label, number) for label in self.class_indices(classes) for number in range(n)]

    def class_indices(self, classes: Sequence[str | int] | str | int | None) -> list[int]:
        """The indices of classes that are given as names or indices; None means all, of a model without classes 0.

        Raises:
            UserError: no such class; the message lists the nearest names.
        """
        if classes is None:
            return list(range(len(self.row_names)))
        if not self.config.model.class_conditional:
            raise UserError("this model was trained without classes: name none")
        given = [classes] if isinstance(classes, (str, int)) else list(classes)
        if not given:
            raise UserError("there are no classes to draw: name one")
        return [self._class_index(one) for one in given]

    def _class_index(self, given: str | int) -> int:
        names = self.class_names
        if not isinstance(given, str):
            index = operator.index(given)
            if not 0 <= index < len(names):
                raise UserError(f"the model has no class of index {index}: it has {len(names)}")
            return index
        if given in names:
            return names.index(given)
        wanted = given.lower().replace(" ", "_")
        near = difflib.get_close_matches(wanted, names, n=5, cutoff=0.5) or names[:5]
        raise UserError(f"the model has no class {given!r} among its {len(names)}; near it: {', '.join(near)}")

    def guided_by(self, guide: Model) -> Model:
        """This model, to be guided by `guide`.

        Raises:
            UserError: the guide draws other images, or has another forward process.
        """
        if guide.class_names != self.class_names or guide.config.model.image_shape != self.config.model.image_shape:
            raise UserError(
                f"{guide.checkpoint} cannot guide {self.checkpoint}: it was trained on other classes or sizes of images"
            )
        own, of_guide = ((c.diffusion.schedule, c.diffusion.timesteps) for c in (self.config, guide.config))
        if own != of_guide or guide.config.model.class_conditional != self.config.model.class_conditional:
            raise UserError(
                f"{guide.checkpoint} cannot guide {self.checkpoint}: diffusion.schedule, diffusion.timesteps and "
                "model.class_conditional must be the same"
            )
        return dataclasses.replace(self, guide=guide)

    def denoiser(self, sampling: SamplingConfig) -> Denoiser:
        """What samples from this model as `sampling` says.

        Raises:
            UserError: guidance that this model cannot have, or a guide where there is none.
        """
        if self.guide is not None and sampling.guidance_scale == 1:
            raise UserError(f"{self.guide.checkpoint} guides nothing at guidance scale 1: give another scale")
        guide = None if self.guide is None else build_denoiser(self.guide.config, self.guide._runner())
        return build_sampling_denoiser(self.config, sampling, self._runner(), len(self.class_names), guide)

    def _runner(self) -> Network:
        return with_autocast(self.network, self.device, arithmetic(self.precision, self.device))

    def draw(
        self,
        keys: Sequence[SampleKey],
        sampling: SamplingConfig,
        *,
        show_progress: bool = False,
        on_step: OnStep | None = None,
    ) -> Iterator[tuple[Sequence[SampleKey], np.ndarray]]:
        """Draw the images of `keys`, a batch at a time: yields (keys, uint8 (N, H, W, C)), as they are finished.

        `on_step` is the samplers' callback. The predictions that it is given are of the batch that is yielded next,
        which may be filled up with repetitions.

        Raises:
            UserError: settings that this model cannot follow.
        """
        denoiser, steps = self.denoiser(sampling), number_of_steps(self.config.diffusion, sampling)
        # With miniters=0 the time alone decides when the bar is drawn, in the middle of a batch too.
        with progress(total=len(keys), desc="sampling", unit="image", miniters=0, disable=not show_progress) as bar:

            def after_step(step: int, prediction: Prediction) -> None:
                if on_step is not None:
                    on_step(step, prediction)
                bar.set_postfix_str(f"step {steps - step} of {steps}", refresh=False)
                bar.update(0)

            for batch, images in generate(denoiser, keys, self.config, sampling, self.device, after_step):
                bar.update(len(batch))
                yield batch, images.cpu().numpy()

    def image_record(self, sampling: SamplingConfig) -> dict[str, Any]:
        """What records say of images drawn as `sampling` says: all that decides them, but for their keys and the
        code."""
        guide = self.guide
        return {
            "checkpoint_sha256": self.checkpoint_sha256,
            "step": self.step,
            **self._average(),
            **sampling_record(self.config, sampling),
            "guide": None if guide is None else {"sha256": guide.checkpoint_sha256, **guide._average()},
            "precision": self.precision,
        }

    def _average(self) -> dict[str, Any]:
        made = {} if self.ema_length is None else {"ema_length": self.ema_length}
        return {"ema_rate": self.ema_rate, **made}


def change_sampling(sampling: SamplingConfig, **given: Any) -> SamplingConfig:
    """`sampling` with those of the `given` settings that are not None. Another sampler does not keep the spacing and
    the options of the first.

    Raises:
        UserError: no such setting, a value of a wrong type or out of range, an option that the sampler lacks, or an
            interval of no guidance.
    """
    changes = {name: value for name, value in given.items() if value is not None}
    if changes.get("sampler", sampling.sampler) != sampling.sampler:
        changes = {"spacing": None, "options": {}, **changes}
    changed = settings_of(SamplingConfig, {**to_plain(sampling), **changes}, "the sampling settings")
    if "guidance_interval" in changes and changed.guidance_scale == 1:
        raise UserError("a guidance interval guides nothing at guidance scale 1: give another scale")
    return changed
