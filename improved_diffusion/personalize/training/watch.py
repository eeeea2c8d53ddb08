"""Looking at a run: pictures of fixed prompts and seeds, what they score, and the loss at fixed timesteps."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from improved_diffusion.diffusion.noise import seeded_generator
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.metrics.estimate import mean_score
from improved_diffusion.metrics.similarity import drift
from improved_diffusion.personalize.config import PersonalizeConfig, WatchConfig
from improved_diffusion.personalize.data.learned import Learned
from improved_diffusion.personalize.generate import BrokenPicture, Sampling, draw
from improved_diffusion.personalize.measuring.choice import Look
from improved_diffusion.personalize.measuring.judge import Judge
from improved_diffusion.personalize.measuring.prompts import SUITES
from improved_diffusion.personalize.measuring.references import References, rows_by_concept, score_pictures
from improved_diffusion.personalize.measuring.sheet import contact_sheet
from improved_diffusion.personalize.models.adapters import set_scales
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.training.trainer import EncodedSet, Trainer

HELD_OUT_NOISE = 200  # purpose of a generator, see trainer.py
CAPTIONS = 4  # of the set that make a suite


class Watch:
    """Draws and measures, the same each time. `protocol` is all of the settings that this depends on: looks can be
    compared where theirs are equal.

    Args:
        base: with the weights that are looked at.
        watch: seeds, scales and so on.
        judge: measures the pictures.
        references: the training images, of each concept.
        prompts: what is drawn.
        class_prompts: what tuned and base should draw alike; may be empty.
        resolution: pixels a side of the pictures.
        folder: where the base's pictures of the class are kept, for the drift from them; those of other prompts, seeds
            or sampling lie beside each other.
        drawing: brings the base to its device, and takes away afterwards what updates do not need.
    """

    def __init__(
        self,
        base: Base,
        watch: WatchConfig,
        judge: Judge,
        references: Sequence[References],
        prompts: list[str],
        class_prompts: list[str],
        resolution: int,
        folder: Path,
        drawing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self.base, self.watch, self.judge, self.drawing = base, watch, judge, drawing
        self.references = references
        self.sampling = Sampling(watch.steps, watch.guidance_scale, height=resolution, width=resolution)
        self.prompts, self.class_prompts = prompts, class_prompts
        drawing = {
            "class_prompts": list(class_prompts),
            "seeds": list(watch.seeds),
            "steps": watch.steps,
            "guidance_scale": watch.guidance_scale,
            "resolution": resolution,
        }
        self.protocol: dict[str, Any] = {
            **drawing,
            "prompts": list(prompts),
            "unet_scale": watch.unet_scale,
            "text_encoder_scale": watch.text_encoder_scale,
            "loss_timesteps": list(watch.loss_timesteps),
            "judges": judge.fingerprints(),
        }
        most = watch.max_references
        if most is not None and any(of_concept.images > most for of_concept in references):
            self.protocol["max_references"] = most
        name = hashlib.sha256(json.dumps(drawing).encode()).hexdigest()[:16]
        pictures = len(class_prompts) * len(watch.seeds)
        self._base_files = [folder / name / f"{number:03d}.png" for number in range(pictures)]

    def keep_base(self) -> None:
        """Draw what the base draws of the class, unless it is there; before anything was learned, or is loaded. (The
        first look at a new run keeps what it draws.)"""
        if self.judge.compares and not all(file.is_file() for file in self._base_files):
            self._save_base(self._draw(self.class_prompts))

    def look(self, step: int) -> tuple[dict[str, Any], np.ndarray]:
        """A record for evaluations.jsonl, and the contact sheet, uint8 (H, W, 3).

        Raises:
            UserError: a picture of one colour, by which one sees broken weights or an overflow in fp16.
        """
        set_scales(self.base, self.watch.unet_scale, self.watch.text_encoder_scale)
        try:
            drawn = self._draw([*self.prompts, *self.class_prompts])
        finally:
            set_scales(self.base, 1.0, 1.0)
        _require_pictures(drawn, step)
        per_prompt = len(self.watch.seeds)
        pictures, of_class = drawn[: len(self.prompts) * per_prompt], drawn[len(self.prompts) * per_prompt :]
        said = [prompt for prompt in self.prompts for _ in self.watch.seeds]
        with self.judge.at_work():
            values = score_pictures(self.judge, self.judge.see(pictures), said, self.references)
            by_concept = {
                name: _means({score: value[rows] for score, value in values.items()})
                for name, rows in rows_by_concept(said, self.references).items()
            }
            if of_class and self.judge.compares:
                values["drift"] = self._drift(step, of_class)
        rows = [drawn[i : i + per_prompt] for i in range(0, len(drawn), per_prompt)]
        sheet = contact_sheet(rows, self.prompts + self.class_prompts, [f"seed {seed}" for seed in self.watch.seeds])
        record = {
            "step": step,
            "scores": _means(values),
            **({"concepts": by_concept} if len(self.references) > 1 else {}),
            "values": {name: value.tolist() for name, value in values.items()},
            "clip": self.judge.clip_name,
            "vision": self.judge.vision_name,
            "protocol": self.protocol,
        }
        return record, sheet

    def _draw(self, prompts: list[str]) -> list[Image.Image]:
        """Each prompt from each seed."""
        seeds = list(self.watch.seeds) * len(prompts)
        texts = [prompt for prompt in prompts for _ in self.watch.seeds]
        with self.drawing():
            return list(draw(self.base, texts, seeds, self.sampling, self.watch.batch_size))

    def _drift(self, step: int, pictures: list[Image.Image]) -> torch.Tensor:
        """How far the pictures of the class are from the base's, which are those of step 0."""
        if step == 0:
            self._save_base(pictures)
        try:
            before = [Image.open(file).convert("RGB") for file in self._base_files]
        except OSError as error:
            folder = self._base_files[0].parent
            raise UserError(f"the base's pictures of the class have gone from {folder}: {error}") from error
        return drift(self.judge.see(pictures).likeness(), self.judge.see(before).likeness())

    def _save_base(self, pictures: Sequence[Image.Image]) -> None:
        for file, picture in zip(self._base_files, pictures, strict=True):
            with atomic_write(file) as temporary:
                picture.save(temporary, format="png")


def _means(values: dict[str, torch.Tensor]) -> dict[str, Any]:
    """{score: its mean over pictures}."""
    return {name: dataclasses.asdict(mean_score(value)) for name, value in values.items()}


def watched_prompts(config: PersonalizeConfig, learned: Learned) -> tuple[list[str], list[str]]:
    """The prompts that `watch` asks for, and those of the class, filled in for each concept. Of a set without a subject
    or of the suite `captions`, some of its captions.

    Raises:
        UserError: one that asks for what is not set.
    """
    watch = config.watch
    prompts, class_prompts = [], []
    for concept, part in enumerate(config.parts):
        subject = part.subject
        of_class = watch.class_prompts if subject.class_name is not None else ()
        class_prompts += [subject.fill(prompt) for prompt in of_class]
        if not watch.prompts and (watch.suite == "captions" or subject.token is None):
            captions = (*learned.held_out.of(concept).texts, *learned.training.of(concept).texts)
            prompts += list(dict.fromkeys(captions))[:CAPTIONS]
        else:
            prompts += [subject.fill(prompt) for prompt in watch.prompts or SUITES[watch.suite]]
    if config.concepts:  # which may have prompts in common
        return list(dict.fromkeys(prompts)), list(dict.fromkeys(class_prompts))
    return prompts, class_prompts


def to_look(record: dict[str, Any]) -> Look | None:
    """What a record of `Watch.look` says of fidelity, prompts and copying; None where no model measured it."""
    values = record["values"]
    likeness = values.get("likeness") or values.get("clip_i")
    if not likeness:
        return None
    prompt, copying = (tuple(values.get(name, ())) for name in ("clip_t", "copying"))
    return Look(record["step"], tuple(likeness), prompt, copying, json.dumps(record.get("protocol"), sort_keys=True))


def series_of(records: Sequence[dict[str, Any]], protocol: dict[str, Any]) -> int:
    """The number, from 1, of the series that a look of this protocol belongs to, after the looks in `records`."""
    known: list[dict[str, Any] | None] = []
    for said in (*(record.get("protocol") for record in records), protocol):
        if said not in known:
            known.append(said)
    return known.index(protocol) + 1


@torch.no_grad()
def fixed_loss(trainer: Trainer, source: EncodedSet, timesteps: Sequence[int]) -> float:
    """The mean-square error over all images of `source`, in their first crop, at `timesteps`, with the same noise each
    time: unlike the loss of a step, it can be compared between steps."""
    total = 0.0
    for index, (text, *_) in enumerate(source.wordings):
        latents = source.examples([index], [0])
        noise = torch.randn(latents.mean.shape, generator=seeded_generator(HELD_OUT_NOISE, index))
        x_0, noise = (tensor.to(trainer.accelerator.device) for tensor in (latents.mean, noise))
        for t in timesteps:
            at = torch.tensor([t], device=x_0.device)
            total += trainer.denoising_losses(x_0, noise, at, [text], latents.size_ids, latents.mask).item()
    return total / (len(source.wordings) * len(timesteps))


def _require_pictures(pictures: Sequence[Image.Image], step: int) -> None:
    for picture in pictures:
        extremes = picture.getextrema()
        if all(high - low <= 1 for low, high in extremes):
            raise BrokenPicture(
                f"at step {step} the model draws pictures of one colour {tuple(low for low, _ in extremes)}: its "
                "weights or its autoencoder overflow; use training.precision bf16 and training.vae_precision float32, "
                "or a lower training.lr"
            )
