"""A grid over runs, checkpoints, scales, guidance, prompts and seeds: training the runs, drawing and scoring."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import PersonalizeConfig
from improved_diffusion.personalize.data.learned import Captioned, open_images
from improved_diffusion.personalize.generate import Sampling
from improved_diffusion.personalize.measuring.judge import Judge
from improved_diffusion.personalize.measuring.references import References, score_pictures, see_training
from improved_diffusion.personalize.models.adapters import set_scales
from improved_diffusion.personalize.models.trained import resolution_of
from improved_diffusion.personalize.models.tuned import Tuned, load_run
from improved_diffusion.personalize.pictures import draw_missing
from improved_diffusion.personalize.studies.sweep_config import DrawGrid, SweepConfig
from improved_diffusion.personalize.training.start import with_precision
from improved_diffusion.progress import progress
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.run_flags import parse_run, run_parser
from improved_diffusion.training.start import holds_run, require_same_run, settings_and_run


@dataclass(frozen=True)
class Point:
    """A point of the grid: all but the prompt and the seed."""

    run: Path
    checkpoint: str
    unet_scale: float
    text_encoder_scale: float
    guidance_scale: float

    @property
    def name(self) -> str:
        scales = f"u{self.unet_scale:g}_t{self.text_encoder_scale:g}_g{self.guidance_scale:g}"
        return f"{self.run.name}/{self.checkpoint.removesuffix('.pt')}_{scales}"


@dataclass(frozen=True)
class SweptRun:
    """A run to draw from, found to be in order."""

    run: RunDirectory
    config: PersonalizeConfig  # with the training images where they are now
    checkpoints: tuple[str, ...]  # names of files, each once
    training: Captioned  # what it was trained on


@dataclass(frozen=True)
class Drawn:
    """A picture of the grid."""

    point: Point
    prompt: str
    seed: int
    file: Path
    scores: dict[str, float]


def train_runs(config: SweepConfig, folder: Path, sweep_file: Path, flags: Sequence[str]) -> list[Path]:
    """Train a run for each combination of `config.train.grid`, each in a process of its own, or go on with it.

    Args:
        config: of the sweep.
        folder: where the runs lie.
        sweep_file: to which the path of the runs' YAML file is relative.
        flags: for all of them.

    Raises:
        UserError: before anything is trained: settings of a run that will not do. Or a run failed; what it said stands
            above.
    """
    commands = {}
    for settings in config.train.combinations():
        of_runs = sweep_file.parent / config.train.config
        name = "_".join(f"{key.split('.')[-1]}-{value}" for key, value in settings.items()) or of_runs.stem
        run = folder / re.sub(r"[^\w.-]+", "-", name)
        if run in commands:  # texts that differ in what no folder's name has
            run = run.with_name(f"{run.name}-{hashlib.sha256(name.encode()).hexdigest()[:6]}")
        grid = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
        afresh = ["--config", str(of_runs), "--out", str(run), *grid, *flags]
        commands[run] = ["--resume", str(run), *grid, *flags] if holds_run(run) else afresh
        settings_of_run = _settings(commands[run])
        _require_drawable(settings_of_run, config.draw)
        _require_unedited(run, settings_of_run, _settings(afresh))
    for run, arguments in commands.items():
        print(f"{'going on with' if '--resume' in arguments else 'training'} {run.name}", flush=True)
        done = subprocess.run([sys.executable, sys.argv[0], "train", *arguments])
        if done.returncode == 130:
            raise KeyboardInterrupt
        if done.returncode:
            raise UserError(f"the run {run} failed: see the error above; the same command goes on from here")
    return list(commands)


def _settings(arguments: list[str]) -> PersonalizeConfig:
    """Those of a run that is trained with these arguments."""
    parser = run_parser(PersonalizeConfig, prog="personalize.py train")
    settings, _ = settings_and_run(PersonalizeConfig, parser, arguments, parse_run(parser, arguments))
    return with_precision(settings)[0]


def _require_drawable(settings: PersonalizeConfig, draw: DrawGrid) -> None:
    """Raise UserError if a run of these settings will not have what is to be drawn from it."""
    if settings.watch.every is None and "best" in draw.checkpoints:
        raise UserError(
            "draw.checkpoints names best, which is chosen by looks, and watch.every null leaves these out: "
            "give --draw.checkpoints [latest]"
        )


def _require_unedited(run: Path, begun: PersonalizeConfig, asked: PersonalizeConfig) -> None:
    """Raise UserError if the runs' file now says other than when the run was begun: that would be ignored."""
    try:
        require_same_run(begun, asked, {})
    except UserError as error:
        raise UserError(
            f"the file of the runs has changed since {run} was begun; give another --out ({error})"
        ) from error


def draw_grid(config: SweepConfig, runs: Sequence[Path], out: Path, device: str, dtype: str) -> list[Drawn]:
    """Draw and score every picture of the grid, in its order.

    Raises:
        UserError: before anything is drawn: a run, checkpoint, base, prompt, scale or training images that will not do.
    """
    all_swept = [_open_run(config, run) for run in runs]
    judge = Judge(config.clip, config.vision, device)
    prompts = sum(len(swept.checkpoints) * len(swept.config.prompts(config.draw.prompts)) for swept in all_swept)
    total = prompts * len(config.draw.points()) * len(config.draw.seeds)
    drawn: list[Drawn] = []
    known: dict[tuple, list[References]] = {}
    with progress(total=total, desc="sweep", unit="picture") as bar:
        for swept in all_swept:
            for checkpoint in swept.checkpoints:
                tuned = load_run(swept.run, checkpoint, config.base, device, dtype)
                references = _references(tuned, swept, judge, known)
                for pictures in _draw_checkpoint(config.draw, tuned, swept.run.path, out):
                    drawn += _score(pictures, judge, references)
                    bar.update(len(pictures))
    return drawn


def _open_run(config: SweepConfig, path: Path) -> SweptRun:
    """The run at `path`, after a trial of all that will be done with it but drawing: grids are drawn for hours."""
    run = RunDirectory(path)
    settings = run.read_config(PersonalizeConfig)
    settings.prompts(config.draw.prompts)
    settings = replace(settings, data=config.data or settings.data)
    training = open_images(settings).training
    # `best` and a file's name may be the same checkpoint.
    checkpoints = tuple(dict.fromkeys(run.choose_checkpoint(name).name for name in config.draw.checkpoints))
    for checkpoint in checkpoints:
        tuned = load_run(run, checkpoint, config.base)
        for scales in config.draw.points():
            set_scales(tuned.base, scales["unet_scales"], scales["text_encoder_scales"])
    return SweptRun(run, settings, checkpoints, training)


def _draw_checkpoint(grid: DrawGrid, tuned: Tuned, run: Path, out: Path) -> Iterator[list[Drawn]]:
    """For each point of this run and checkpoint its pictures, not yet scored; only what is missing is drawn."""
    side = resolution_of(tuned.config, tuned.base)
    weights = tuned.checkpoint.stat()
    what = (weights.st_size, weights.st_mtime_ns, tuned.base.name, side, grid.steps, grid.negative_prompt)
    prompts = list(enumerate(tuned.config.prompts(grid.prompts)))
    for unet, text, guidance in (point.values() for point in grid.points()):
        point = Point(run, tuned.checkpoint.name, unet, text, guidance)
        folder = out / "pictures" / point.name
        pictures = [
            Drawn(point, prompt, seed, folder / f"{number:02d}_seed{seed}_{_digest(*what, prompt)}.png", {})
            for number, prompt in prompts
            for seed in grid.seeds
        ]
        set_scales(tuned.base, unet, text)
        sampling = Sampling(grid.steps, guidance, grid.negative_prompt, height=side, width=side)
        files, texts, seeds = zip(*((p.file, p.prompt, p.seed) for p in pictures), strict=True)
        draw_missing(tuned.base, files, texts, seeds, sampling, grid.batch_size)
        yield pictures


def _digest(*what: object) -> str:
    """Of what decides a picture beside its point and seed, for its name: changed settings draw it anew."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:8]


def _references(tuned: Tuned, swept: SweptRun, judge: Judge, known: dict[tuple, list[References]]) -> list[References]:
    """The training images of a run; those that several runs share are looked at once, whatever these call them."""
    config, side = swept.config, resolution_of(swept.config, tuned.base)
    most = config.watch.max_references
    key = (tuned.base.name, side, config.data, config.concepts, config.images, config.seed, most)
    if key not in known:
        known[key] = see_training(tuned.base, judge, swept.training, config, side)
    return [replace(of, token=part.subject.token) for of, part in zip(known[key], config.parts, strict=True)]


def _score(pictures: list[Drawn], judge: Judge, references: list[References]) -> list[Drawn]:
    seen = judge.see(Image.open(picture.file).convert("RGB") for picture in pictures)
    prompts = [picture.prompt for picture in pictures]
    values = score_pictures(judge, seen, prompts, references)
    return [
        replace(picture, scores={name: value[i].item() for name, value in values.items()})
        for i, picture in enumerate(pictures)
    ]
