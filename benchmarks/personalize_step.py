"""What an update of fine-tuning costs, against a bare loop of diffusers and peft that trains the same.

    python benchmarks/personalize_step.py

Both train LoRA on a tiny random UNet (scripts/tiny_pipeline.py), with the same adapters, latents and texts kept, the
same AdamW and clipping, on one thread. The bare loop is a page of PyTorch: no accelerator, no configuration, no log, no
resuming. The two take turns, a few updates at a time, so that a noisy machine slows both alike; times are those of the
CPU, and the ratio is the median of those of the rounds. The smaller the network, the more the rest weighs: with
published ones it cannot be seen.
"""

from __future__ import annotations

import argparse
import io
import runpy
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image

from improved_diffusion.data.synthetic import draw
from improved_diffusion.errors import user_errors_exit
from improved_diffusion.personalize.config import ImagesConfig, PersonalizeConfig, TrainingConfig
from improved_diffusion.personalize.data.captioned import CaptionedImage
from improved_diffusion.personalize.data.examples import Examples
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.models.encoding import encode_texts
from improved_diffusion.personalize.models.trained import Trained, prepare
from improved_diffusion.personalize.training.trainer import EncodedSet, Trainer

TINY = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "tiny_pipeline.py"))
IMAGES, RESOLUTION = 8, 16  # which these networks are made for
ROUNDS, STEPS = 30, 5


class Bare:
    """The loop that one writes first: of this base, with its adapters."""

    def __init__(self, base: Base, trained: Trained, source: EncodedSet, config: PersonalizeConfig):
        training = config.training
        self.base, self.batch_size, self.clip = base, training.batch_size, training.grad_clip
        self.latents = source.examples(range(IMAGES), [0] * IMAGES)
        with torch.no_grad():
            self.conditions = encode_texts(base, [wordings[0] for wordings in source.wordings])
        self.parameters = list(trained.parameters.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=training.lr, weight_decay=training.weight_decay, fused=True
        )
        self.scheduler = diffusers.DDPMScheduler.from_config(base.pipeline.scheduler.config)
        base.unet.train()

    def step(self) -> None:
        chosen = torch.randint(len(self.latents.mean), (self.batch_size,))
        mean, std = self.latents.mean[chosen], self.latents.std[chosen]
        x_0 = mean + std * torch.randn_like(mean)
        noise = torch.randn_like(x_0)
        t = torch.randint(self.scheduler.config.num_train_timesteps, (self.batch_size,))
        added = None
        if self.base.is_sdxl:
            added = {"text_embeds": self.conditions["pooled"][chosen], "time_ids": self.latents.size_ids[chosen]}
        predicted = self.base.unet(
            self.scheduler.add_noise(x_0, noise, t),
            t,
            encoder_hidden_states=self.conditions["states"][chosen],
            added_cond_kwargs=added,
        ).sample
        F.mse_loss(predicted, noise).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def prepared(kind: str, config: PersonalizeConfig) -> tuple[Base, Trained, EncodedSet]:
    """A base with its adapters, and what it learns."""
    base = Base(f"tiny {kind}", TINY["make_pipeline"](kind))
    trained = prepare(base, config)
    images = []
    for number in range(IMAGES):
        buffer = io.BytesIO()
        Image.fromarray(draw(0, "cup_cakes", number)).resize((RESOLUTION,) * 2).save(buffer, format="png")
        images.append(CaptionedImage(f"{number}.png", f"cup cake number {number}", buffer.getvalue))
    examples = Examples(base, images, [(RESOLUTION,) * 2] * IMAGES, config.images)
    return base, trained, EncodedSet(examples, [(image.caption,) for image in images])


def milliseconds(update: Callable[[], object]) -> float:
    started = time.process_time()
    for _ in range(STEPS):
        update()
    return (time.process_time() - started) / STEPS * 1000


def compare(kind: str, batch_size: int) -> None:
    training = TrainingConfig(steps=1, batch_size=batch_size, precision="float32")
    config = PersonalizeConfig(training=training, images=ImagesConfig(resolution=RESOLUTION))
    base, trained, source = prepared(kind, config)
    trainer = Trainer(base, trained, config, source, {}, Accelerator(cpu=True))
    updates = {"trainer": trainer.train_step, "bare": Bare(*prepared(kind, config), config).step}
    times: dict[str, list[float]] = {name: [] for name in updates}
    for update in updates.values():
        milliseconds(update)  # the texts are encoded as they first come, and Adam's moments made
    for _ in range(ROUNDS):
        for name, update in updates.items():
            times[name].append(milliseconds(update))
    ratio = float(np.median(np.divide(times["trainer"], times["bare"])))
    medians = ", ".join(f"{name} {np.median(values):.1f} ms" for name, values in times.items())
    print(f"tiny {kind}, batch {batch_size}: {medians}: {ratio:.2f} times (median of {ROUNDS} rounds)")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for kind in ("sd", "sdxl"):
        for batch_size in (1, 4):
            compare(kind, batch_size)


if __name__ == "__main__":
    with user_errors_exit():
        main()
