"""Looking at a run: pictures of fixed prompts and seeds, what they score, and the loss at fixed timesteps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from improved_diffusion.diffusion.noise import seeded_generator
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.personalize.config import PersonalizeConfig, WatchConfig
from improved_diffusion.personalize.generate import BrokenPicture, Sampling, draw
from improved_diffusion.personalize.measuring import scores
from improved_diffusion.personalize.measuring.choice import Look
from improved_diffusion.personalize.measuring.judge import Judge
from improved_diffusion.personalize.measuring.prompts import SUITES
from improved_diffusion.personalize.measuring.references import References, measure
from improved_diffusion.personalize.measuring.sheet import contact_sheet
from improved_diffusion.personalize.models.adapters import set_scales
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.training.trainer import Source, Trainer

HELD_OUT_NOISE = 200  # purpose of a generator, see trainer.py
CAPTIONS = 4  # of the set that make a suite


class Watch:
    """Draws and measures, the same each time.

    Args:
        base: with the weights that are looked at.
        watch: seeds, scales and so on.
        judge: measures the pictures.
        references: the training images.
        prompts: what is drawn.
        class_prompts: what tuned and base should draw alike; may be empty.
        resolution: pixels a side of the pictures.
        folder: where the base's pictures of the class are kept, for the drift from them.
    """

    def __init__(
        self,
        base: Base,
        watch: WatchConfig,
        judge: Judge,
        references: References,
        prompts: list[str],
        class_prompts: list[str],
        resolution: int,
        folder: Path,
    ):
        self.base, self.watch, self.judge = base, watch, judge
        self.references, self.folder = references, folder
        self.sampling = Sampling(watch.steps, watch.guidance_scale, height=resolution, width=resolution)
        self.prompts, self.class_prompts = prompts, class_prompts

    def look(self, step: int) -> tuple[dict[str, Any], np.ndarray]:
        """A record for evaluations.jsonl, and the contact sheet, uint8 (H, W, 3).

        Raises:
            UserError: a picture of one colour, by which one sees broken weights or an overflow in fp16.
        """
        set_scales(self.base, self.watch.unet_scale, self.watch.text_encoder_scale)
        try:
            pictures = self._draw(self.prompts)
            of_class = self._draw(self.class_prompts)
        finally:
            set_scales(self.base, 1.0, 1.0)
        _require_pictures([*pictures, *of_class], step)
        texts = self.judge.read([prompt for prompt in self.prompts for _ in self.watch.seeds])
        values = measure(self.judge.see(pictures), texts, self.references)
        if of_class and self.judge.compares:
            values["drift"] = self._drift(step, of_class)
        per_prompt = len(self.watch.seeds)
        shown = [*pictures, *of_class]
        rows = [shown[i : i + per_prompt] for i in range(0, len(shown), per_prompt)]
        sheet = contact_sheet(rows, self.prompts + self.class_prompts, [f"seed {seed}" for seed in self.watch.seeds])
        record = {
            "step": step,
            "scores": {name: dataclasses.asdict(scores.mean_score(value)) for name, value in values.items()},
            "values": {name: value.tolist() for name, value in values.items()},
            "clip": self.judge.clip_name,
            "vision": self.judge.vision_name,
        }
        return record, sheet

    def _draw(self, prompts: list[str]) -> list[Image.Image]:
        """Each prompt from each seed."""
        seeds = list(self.watch.seeds) * len(prompts)
        texts = [prompt for prompt in prompts for _ in self.watch.seeds]
        return list(draw(self.base, texts, seeds, self.sampling, self.watch.batch_size))

    def _drift(self, step: int, pictures: list[Image.Image]) -> torch.Tensor:
        """How far the pictures of the class are from the base's, which are those of step 0."""
        files = [self.folder / f"{number:03d}.png" for number in range(len(pictures))]
        if step == 0:
            for file, picture in zip(files, pictures, strict=True):
                with atomic_write(file) as temporary:
                    picture.save(temporary, format="png")
        try:
            before = [Image.open(file).convert("RGB") for file in files]
        except OSError as error:
            raise UserError(f"the base's pictures of the class have gone from {self.folder}: {error}") from error
        return scores.drift(self.judge.see(pictures).likeness(), self.judge.see(before).likeness())


def watched_prompts(config: PersonalizeConfig, captions: Sequence[str]) -> tuple[list[str], list[str]]:
    """The prompts that `watch` asks for, and those of the class, filled in. Of a set without a subject or of the suite
    `captions`, some of its captions.

    Raises:
        UserError: one that asks for what is not set.
    """
    watch, subject = config.watch, config.subject
    of_class = watch.class_prompts if subject.class_name is not None else ()
    class_prompts = [subject.fill(prompt) for prompt in of_class]
    if not watch.prompts and (watch.suite == "captions" or subject.token is None):
        return list(dict.fromkeys(captions))[:CAPTIONS], class_prompts
    return [subject.fill(prompt) for prompt in watch.prompts or SUITES[watch.suite]], class_prompts


def to_look(record: dict[str, Any]) -> Look | None:
    """What a record of `Watch.look` says of fidelity, prompts and copying; None where no model measured it."""
    values = record["values"]
    likeness = values.get("likeness") or values.get("clip_i")
    if not likeness:
        return None
    return Look(record["step"], tuple(likeness), tuple(values.get("clip_t", ())), tuple(values.get("copying", ())))


@torch.no_grad()
def fixed_loss(trainer: Trainer, source: Source, timesteps: Sequence[int]) -> float:
    """The mean-square error over all images of `source`, in their first crop, at `timesteps`, with the same noise each
    time: unlike the loss of a step, it can be compared between steps."""
    total = 0.0
    for index, text in enumerate(source.texts):
        latents = source.examples([index], [0])
        noise = torch.randn(latents.mean.shape, generator=seeded_generator(HELD_OUT_NOISE, index))
        x_0, noise = (tensor.to(trainer.accelerator.device) for tensor in (latents.mean, noise))
        for t in timesteps:
            at = torch.tensor([t], device=x_0.device)
            total += trainer.denoising_losses(x_0, noise, at, [text], latents.size_ids).item()
    return total / (len(source.texts) * len(timesteps))


def _require_pictures(pictures: Sequence[Image.Image], step: int) -> None:
    for picture in pictures:
        extremes = picture.getextrema()
        if all(high - low <= 1 for low, high in extremes):
            raise BrokenPicture(
                f"at step {step} the model draws pictures of one colour {tuple(low for low, _ in extremes)}: its "
                "weights or its autoencoder overflow; use training.precision bf16 and training.vae_precision float32, "
                "or a lower training.lr"
            )
