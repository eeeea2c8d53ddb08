"""Styles of users' own: LoRA runs of personalize.py on the base, trained a chunk at a time."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import torch
from PIL import Image

from improved_diffusion.checkpoint_file import read_checkpoint
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.personalize.config import (
    ImagesConfig,
    PersonalizeConfig,
    SubjectConfig,
    TrainingConfig,
    WatchConfig,
)
from improved_diffusion.personalize.training import start
from improved_diffusion.personalize.training.loop import PersonalizeLoop
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.runtime.devices import usable_device
from improved_diffusion.serving.config import ServingConfig
from improved_diffusion.serving.device import MayGoOn, release_memory
from improved_diffusion.serving.queue import Job
from improved_diffusion.serving.requests import TuneRequest
from improved_diffusion.training.start import holds_run, state_to_resume

RUN, PICTURES, ENCODED = "run", "pictures", "encoded"  # in the folder of a job's results
SHOWN = {"seeds": (0, 1), "steps": 20}  # pictures in the style, when it is learned


def run_of(results: Path, style: str) -> RunDirectory:
    """That of a user's own style, by the job that learned it."""
    return RunDirectory(results / style / RUN)


def tune_config(request: TuneRequest, base: str, pictures: Path) -> PersonalizeConfig:
    """The settings of the run that learns a style from the folder `pictures`."""
    return PersonalizeConfig(
        base=base,
        data=str(pictures),
        seed=request.seed,
        subject=SubjectConfig(request.token, request.class_name),
        images=ImagesConfig(cache_folder=str(pictures.with_name(ENCODED))),  # which goes with them
        # A checkpoint at the end of each chunk, and a look at the end of all.
        training=TrainingConfig(steps=request.steps, save_every=request.steps, keep_checkpoints=1),
        watch=WatchConfig(
            every=request.steps,
            prompts=(SubjectConfig.prompt,),
            class_prompts=(),
            clip=None,
            vision=None,
            **SHOWN,
        ),
    )


class Tuner:
    """Learns styles on the base of the settings. Between chunks it keeps the last one in memory, with a base of its
    own."""

    def __init__(self, config: ServingConfig):
        self.config = config
        self.device = usable_device(config.models.device)
        self._kept: tuple[str, PersonalizeLoop] | None = None  # by its job

    def learn(self, job: Job, may_go_on: MayGoOn) -> list[Image.Image] | None:
        """See `Learner`.

        Raises:
            UserError: see `start.build` and `PersonalizeLoop.train`; or the pictures are gone.
        """
        run, steps = run_of(self.config.results, job.id), job.request.steps
        pictures = run.path.with_name(PICTURES)  # which go first when it is done
        if pictures.is_dir() or not holds_run(run.path):
            with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
                loop = self._loop(job, run, pictures)
                self._kept = None  # what breaks off is not gone on with
                if not loop.train(lambda: not may_go_on(loop.trainer.step / steps)):
                    self._kept = job.id, loop
                    return None
            del loop
        _complete(run, pictures)
        self.release()
        with Image.open(run.samples / f"step_{steps:07d}.png") as sheet:
            return [sheet.convert("RGB")]

    def release(self) -> None:
        self._kept = None
        release_memory()

    def _loop(self, job: Job, run: RunDirectory, pictures: Path) -> PersonalizeLoop:
        """The loop as it was left: in memory, or else on disk."""
        if self._kept is not None and self._kept[0] == job.id:
            return self._kept[1]
        self.release()
        self._copy_pictures(job.request, pictures)
        config = tune_config(job.request, self.config.models.text_base, pictures)
        config, _ = start.with_precision(config, self.device)
        state = state_to_resume(run, str(run.path), start.TRAINING_STATE) if holds_run(run.path) else None
        accelerator = start.start_accelerator(config, cpu=self.device.type == "cpu")
        loop = start.build(config, run, state, accelerator, say=lambda _: None)
        if state is None:
            loop.looked_at = 0  # before anything was learned there is nothing to see
        return loop

    def _copy_pictures(self, request: TuneRequest, folder: Path) -> None:
        for number, upload in enumerate(request.uploads):
            if not (self.config.uploads / upload).is_file():
                raise UserError("the pictures to learn from are gone: send them again")
            with atomic_write(folder / f"{number:03d}.png") as temporary:
                shutil.copyfile(self.config.uploads / upload, temporary)


def _complete(run: RunDirectory, pictures: Path) -> None:
    """Keep of a finished run what is drawn with, and not what it learned from."""
    for folder in (pictures.with_name(ENCODED), pictures, run.tensorboard):
        shutil.rmtree(folder, ignore_errors=True)
    state = read_checkpoint(run.latest_checkpoint())
    run.save_checkpoint({name: state[name] for name in ("step", "model", "ema")}, keep=1)
