"""Images/s of fine-tuning with latents and text embeddings kept, against encoding them at every step; and the start of
a resumed run, which finds them on disk, against one that encodes them.

    python benchmarks/personalize_cache.py

Tiny random models (scripts/tiny_pipeline.py) on pictures that the project draws itself, each of 320 pixels a side and
cut to 64; the time to fill the cache is left out and printed beside. The two take turns, a few steps at a time, so that
a noisy machine slows both alike. The share of encoding, and so the ratio, is that of the tiny models: published ones
have others.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import runpy
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
from accelerate import Accelerator
from PIL import Image

from improved_diffusion.data.synthetic import draw
from improved_diffusion.errors import user_errors_exit
from improved_diffusion.personalize.config import ImagesConfig, PersonalizeConfig, TrainingConfig
from improved_diffusion.personalize.data.captioned import CaptionedImage
from improved_diffusion.personalize.data.encoded_files import EncodedFiles
from improved_diffusion.personalize.data.examples import Conditions, Examples
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.models.trained import prepare
from improved_diffusion.personalize.training.trainer import EncodedSet, Trainer

TINY = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "tiny_pipeline.py"))
SIDE, RESOLUTION, IMAGES, BATCH = 320, 64, 16, 4
ROUNDS, STEPS = 10, 5


def pictures() -> list[CaptionedImage]:
    """PNG files, as a user has them, in memory."""
    files = []
    for number in range(IMAGES):
        buffer = io.BytesIO()
        Image.fromarray(draw(0, "cup_cakes", number)).resize((SIDE, SIDE)).save(buffer, format="png")
        files.append(CaptionedImage(f"{number}.png", f"cup cake number {number}", buffer.getvalue))
    return files


def make_trainer(kind: str, config: PersonalizeConfig) -> tuple[Trainer, float]:
    """A trainer of a fresh model, and the seconds that its cache took."""
    base = Base(f"tiny {kind}", TINY["make_pipeline"](kind))
    trained = prepare(base, config)
    images = pictures()
    started = time.perf_counter()
    examples = Examples(base, images, [(RESOLUTION, RESOLUTION)] * len(images), config.images)
    seconds = time.perf_counter() - started
    return Trainer(
        base, trained, config, EncodedSet(examples, [(i.caption,) for i in images]), {}, Accelerator()
    ), seconds


def resume(kind: str) -> None:
    """Seconds until all images and texts are there: encoded, written as well, and found."""
    base = Base(f"tiny {kind}", TINY["make_pipeline"](kind))
    images, config = pictures(), ImagesConfig(resolution=RESOLUTION)

    def seconds(on_disk: bool) -> float:
        started = time.process_time()
        of_images, of_texts = None, None
        if on_disk:
            of_images, of_texts = EncodedFiles(base.pipeline.vae), EncodedFiles(*base.text_encoders.values())
        Examples(base, images, [(RESOLUTION, RESOLUTION)] * len(images), config, of_images)
        Conditions(base, True, of_texts)([image.caption for image in images])
        return time.process_time() - started

    none, filling, found = [], [], []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, IMPROVED_DIFFUSION_CACHE=folder):
            for times, on_disk in ((none, False), (filling, True), (found, True)):
                times.append(seconds(on_disk))
    none, filling, found = (float(np.median(times)) for times in (none, filling, found))
    print(
        f"tiny {kind}, {IMAGES} images and texts at a resume: {none:.2f} s encoded, {found:.3f} s from disk: "
        f"{none / found:.0f} times ({filling:.2f} s to encode and write them)"
    )


def compare(kind: str) -> None:
    training = TrainingConfig(steps=1, batch_size=BATCH)
    config = PersonalizeConfig(training=training, images=ImagesConfig(resolution=RESOLUTION))
    trainers = {}
    for cache in (True, False):
        images = dataclasses.replace(config.images, cache=cache)
        trainers[cache], seconds = make_trainer(kind, dataclasses.replace(config, images=images))
        if cache:
            filling = seconds
    rates: dict[bool, list[float]] = {True: [], False: []}
    for trainer in trainers.values():
        for _ in range(STEPS):  # the texts are encoded as they first come
            trainer.train_step()
    for _ in range(ROUNDS):
        for cache, trainer in trainers.items():
            started = time.perf_counter()
            for _ in range(STEPS):
                trainer.train_step()
            rates[cache].append(STEPS * BATCH / (time.perf_counter() - started))
    kept, encoded = (float(np.median(rates[cache])) for cache in (True, False))
    print(
        f"tiny {kind}: {kept:.1f} images/s kept, {encoded:.1f} encoded at every step: {kept / encoded:.2f} times "
        f"(medians of {ROUNDS} rounds; {filling:.1f} s to encode {IMAGES} images)"
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    for kind in ("sd", "sdxl"):
        resume(kind)
        compare(kind)


if __name__ == "__main__":
    with user_errors_exit():
        main()
