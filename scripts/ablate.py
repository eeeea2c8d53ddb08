"""Which settings win, and by how much: train each choice with several seeds, and compare their images and bounds.

python scripts/ablate.py --arms loss=mse,hybrid,vlb --seeds 3 --out runs/ablation [--hours 1] [--training.lr 1e-4 ...]

The arms are the values of any setting of train.py; of several --arms all combinations. Runs of one seed see the same
images, flips, timesteps and noise, and begin with the same weights as far as their networks are alike: they are
compared in pairs. They take equally many steps or, with --hours, equally long. What is not an option of this script
goes to train.py. Runs that are finished are kept and interrupted ones go on, so the command can simply be given again,
with the same settings. Written are ablation.csv, ablation.md and ablation.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import math
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from improved_diffusion.config import SAMPLER_OPTIONS, Config
from improved_diffusion.config_file import RUNS, load_config
from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit
from improved_diffusion.files import write_text
from improved_diffusion.run_flags import run_type_of_flags
from improved_diffusion.settings import parse_arguments, read_settings, settings_parser, to_plain, to_settings

PROJECT = Path(__file__).resolve().parent.parent
POINTS = 5  # evaluations of a run with --hours
PROBES, PROBE_SECONDS, PROBE_WARM_UP = 3, 8, 3  # by which the steps of an hour are reckoned; each after so many steps
NOT_OF_THE_MODEL = ("log_every", "save_every", "keep_checkpoints")  # settings of training that do not change it


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and the flags that are left for train.py."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    arms_help = "a setting of train.py and the values to compare, as loss=mse,hybrid; again for all combinations"
    add("--arms", action="append", required=True, metavar="KEY=V1,V2", help=arms_help)
    add("--seeds", type=int, default=3, help="runs of each arm, with seeds 0, 1, ... (default: %(default)s)")
    add("--hours", type=float, help="of training for each run, in place of equally many steps")
    add("--out", type=Path, default=Path("runs/ablation"), help="default: %(default)s")
    add("--config", type=Path, help="YAML file of settings (default: as train.py chooses)")
    add("--features", type=int, nargs="+", default=[64, 2048], choices=(64, 192, 768, 2048), help="default: 64 2048")
    steps_help = "at which FID is measured, beside all of the model's (default: 10 25 50 100)"
    add("--sampling-steps", type=int, nargs="+", default=[10, 25, 50, 100], help=steps_help)
    add("--sampler", choices=tuple(SAMPLER_OPTIONS), help="for that (default: as the runs' settings say)")
    add("--per-class", type=int, help="images of each class for that (default: evaluation.samples_per_class)")
    add("--generation-seed", type=int, default=1, help="of these images (default: %(default)s)")
    bound_help = "held-out images for bits/dim; 0 for none (default: 100, or all if there are fewer)"
    add("--bound-images", type=int, help=bound_help)
    options, for_training = parser.parse_known_args(arguments)
    for name, least in {"seeds": 1, "per_class": 1, "generation_seed": 0, "bound_images": 0}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if min(options.sampling_steps) < 1:
        parser.error(f"--sampling-steps must be at least 1, not {min(options.sampling_steps)}")
    if options.hours is not None and not 0 < options.hours < math.inf:
        parser.error(f"--hours must be more than 0, not {options.hours:g}")
    options.features = sorted(set(options.features))
    return options, for_training


def main(arguments: list[str]) -> None:
    options, for_training = parse(arguments)
    arms = arms_of(options.arms)
    require_free_flags(for_training, next(iter(arms.values())), options.hours)

    from ablation_measures import Measures
    from ablation_report import write_report

    from improved_diffusion.runtime.devices import start_processes

    with start_processes() as processes:
        flags = {name: [*own, *for_training] for name, own in arms.items()}
        settings = {name: settled(of_arm, options.config) for name, of_arm in flags.items()}
        require_different(settings)
        measures = Measures(settings, options, processes.device)
        files = {name: options.out / f"{name}.yaml" for name in arms}
        for name, file in files.items():
            require_same_settings(settings[name], file)
        if options.hours is not None:
            unknown = {name: settings[name] for name, file in files.items() if kept_pace(file) is None}
            for name, seconds in measured_paces(unknown).items():
                keep(settings[name], files[name], seconds)
            for name, file in files.items():
                seconds = kept_pace(file)
                flags[name] += flags_of_hours(options.hours, seconds)
                settings[name] = settled(flags[name], options.config)
                keep(settings[name], file, seconds)
        rows = []
        for seed in range(options.seeds):
            for name, of_arm in settings.items():
                run = options.out / f"{name}-seed{seed}"
                train(run, of_arm, seed, options.config, flags[name])
                rows += measures.of_run(run, name, seed)
            title = f"`{shlex.join(['python', 'scripts/ablate.py', *arguments])}`"
            report = write_report(rows, settings, options.out, [title, measures.describe()], options.hours is not None)
    print(f"\n{report}\n\nwrote ablation.md, ablation.png and ablation.csv in {options.out}")


# ----------------------------------------------------------------------------------------------------------------------
# The arms


def arms_of(given: Sequence[str]) -> dict[str, list[str]]:
    """{name: flags of train.py} of all combinations of what is `given`, each as KEY=V1,V2; lists are in brackets.

    Raises:
        UserError: no such setting, nothing to compare, or the same twice.
    """
    known = dict.fromkeys(name for kind in RUNS.values() for name in setting_names(kind))
    choices: dict[str, list[str]] = {}
    for text in given:
        key, _, values = text.partition("=")
        if key == "seed":
            raise UserError("--arms seed: say with --seeds how many runs of each arm there are")
        if key not in known:
            near = [name for name in known if name.endswith(f".{key}")] or difflib.get_close_matches(key, known, n=3)
            advice = f"; near it: {', '.join(near)}" if near else ""
            raise UserError(f"--arms {text}: train.py has no setting {key!r}{advice}")
        if key in choices:
            raise UserError(f"--arms {key} is given twice: write all its values after one")
        choices[key] = [value.replace(" ", "") for value in re.split(r",(?![^\[{]*[\]}])", values)]
        if "" in choices[key]:
            raise UserError(f"--arms {text}: give at least one value, and none that is empty: {key}=V1,V2")
    arms = {}
    for combination in itertools.product(*choices.values()):
        pairs = list(zip(choices, combination, strict=True))
        # A loss goes by its name alone, as in ablations of former versions, which are gone on with.
        name = ",".join(value if key == "loss" else f"{key}={value}" for key, value in pairs).replace("/", "_")
        if name in arms:
            raise UserError(f"--arms: {name} is there twice")
        arms[name] = [f"--{key}={value}" for key, value in pairs]
    if len(arms) < 2:
        raise UserError(f"--arms {given[0]} is one arm, with nothing to compare it with: give a second value")
    return arms


def setting_names(kind: type, group: str = "") -> list[str]:
    """The names of all settings of the dataclass `kind`: loss, training.lr, ..."""
    names = []
    for field in dataclasses.fields(kind):
        nested = field.default_factory
        inner = isinstance(nested, type) and dataclasses.is_dataclass(nested)
        names += setting_names(nested, f"{group}{field.name}.") if inner else [group + field.name]
    return names


def require_free_flags(for_training: Sequence[str], of_arm: Sequence[str], hours: float | None) -> None:
    """Raise UserError where train.py is to be told what this script decides."""
    told = {flag.split("=")[0] for flag in for_training}
    if own := told & {"--seed", "--resume", *(flag.split("=")[0] for flag in of_arm)}:
        raise UserError(f"{min(own)} is what differs between the runs of an ablation: give --arms, --seeds and --out")
    of_arms = {flag.split("=")[0] for flag in of_arm}
    if hours is not None and (own := (told | of_arms) & {"--training.steps", "--evaluation.every"}):
        raise UserError(f"{min(own)} follows from --hours: leave out one of them")


def settled(flags: list[str], config_file: Path | None) -> Config:
    """The settings that train.py would give a new run with these flags, with the paths in them absolute."""
    from improved_diffusion.runtime.devices import Processes, usable_device
    from improved_diffusion.training import start
    from improved_diffusion.training.evaluation import SPLITS_BESIDE

    kind = run_type_of_flags([*([f"--config={config_file}"] if config_file else []), *flags])
    parser = settings_parser(kind)
    defaults = start.choose_defaults(parse_arguments(parser, flags).loss, PROJECT)
    file = config_file or defaults.config
    in_file, _ = start.without_another_network(read_settings(file), kind)
    settings = to_settings(kind, parser, parse_arguments(parser, flags, in_file, str(file)))
    settings = start.with_data(settings, defaults, Processes(usable_device()))

    def absolute(path: str | None) -> str | None:
        return path if path is None or path in SPLITS_BESIDE else str(Path(path).resolve())

    evaluation = settings.evaluation
    return dataclasses.replace(
        settings,
        data=absolute(settings.data),
        evaluation=dataclasses.replace(
            evaluation, reference=absolute(evaluation.reference), weights=absolute(evaluation.weights)
        ),
    )


def require_different(settings: Mapping[str, Config]) -> None:
    """Raise UserError where two arms would train the same model."""

    def decisive(of_arm: Config) -> dict[str, Any]:
        plain = to_plain(of_arm)
        ignored = {*NOT_OF_THE_MODEL, *(["cooldown"] if of_arm.training.lr_schedule != "wsd" else [])}
        training = {name: value for name, value in plain["training"].items() if name not in ignored}
        diffusion = {**plain["diffusion"], **({"vlb_weight": None} if of_arm.loss != "hybrid" else {})}
        return {**plain, "training": training, "diffusion": diffusion, "evaluation": None, "sampling": None}

    for (first, one), (second, other) in itertools.combinations(settings.items(), 2):
        if decisive(one) == decisive(other):
            raise UserError(
                f"the arms {first} and {second} train the same model: let them differ in more than how it is measured"
            )


def require_same_settings(settings: Config, file: Path) -> None:
    """Keep the settings of an arm in `file`. What was trained with others is not to be compared silently.

    Raises:
        UserError: there are others already, which differ in more than the number of steps and the like; the message
            names one.
    """
    from improved_diffusion.training.start import CHANGEABLE, require_same_run

    if file.is_file():
        old = load_config(file)
        changeable = {group: CHANGEABLE[group] for group in ("", "training")} | {"evaluation": ("every",)}
        try:
            if type(old) is not type(settings):
                raise UserError(f"model.kind was {old.model.kind} and would be {settings.model.kind}")
            require_same_run(old, settings, changeable)
        except UserError as error:
            raise UserError(f"{file.parent} has runs with other settings, choose another --out: {error}") from None
    keep(settings, file, kept_pace(file))


def keep(settings: Config, file: Path, seconds_per_step: float | None) -> None:
    """Write the settings of an arm, and its pace as far as it is known."""
    measured = {} if seconds_per_step is None else {"provenance": {"seconds_per_step": seconds_per_step}}
    write_text(file, yaml.safe_dump({**to_plain(settings), **measured}, sort_keys=False))


# ----------------------------------------------------------------------------------------------------------------------
# Equal time


def kept_pace(file: Path) -> float | None:
    """The seconds that a step takes, if they were measured for the arm of this file."""
    plain = yaml.safe_load(file.read_text()) if file.is_file() else {}
    return plain.get("provenance", {}).get("seconds_per_step")


def measured_paces(settings: Mapping[str, Config]) -> dict[str, float]:
    """The seconds that a step of each arm takes, without evaluations and checkpoints: the least of several turns, for
    what else the machine does only adds to them, and not to all arms alike."""
    paces: dict[str, float] = {}
    for _ in range(PROBES):
        for name, of_arm in settings.items():
            paces[name] = min(pace(of_arm), paces.get(name, math.inf))
    for name, seconds in paces.items():
        print(f"{name}: {seconds:.3g} seconds a step", flush=True)
    return paces


def pace(settings: Config) -> float:
    """Train for a moment: the seconds that a step takes."""
    from improved_diffusion.data import open_image_set
    from improved_diffusion.runtime.devices import Processes, usable_device
    from improved_diffusion.training.trainer import Trainer

    processes = Processes(usable_device())
    trainer = Trainer(settings, open_image_set(settings.data), processes)
    batches = trainer.stream.batches(0)
    while trainer.step < PROBE_WARM_UP:
        trainer.train_step(*next(batches))
    trainer.terms.flush(processes)  # waits for the device
    started, elapsed = time.monotonic(), 0.0
    while elapsed < PROBE_SECONDS:
        trainer.train_step(*next(batches))
        trainer.terms.flush(processes)
        elapsed = time.monotonic() - started
    return elapsed / (trainer.step - PROBE_WARM_UP)


def flags_of_hours(hours: float, seconds_per_step: float) -> list[str]:
    """Flags of train.py for so many hours of training, evaluated at equal parts of it."""
    every = max(1, round(3600 * hours / seconds_per_step / POINTS))
    return [f"--training.steps={POINTS * every}", f"--evaluation.every={every}"]


# ----------------------------------------------------------------------------------------------------------------------
# The runs


def train(run: Path, settings: Config, seed: int, config_file: Path | None, flags: Sequence[str]) -> None:
    """Train, or finish training, one run. A run that is there gets all flags again, and what a config file said, so
    that train.py refuses what it was not trained with, be it the content of the images."""
    from improved_diffusion.training.start import holds_run

    flags = [*flags, f"--seed={seed}"]
    if holds_run(run):
        steps = settings.training.steps
        command = ["--resume", str(run), *flags, f"--data={settings.data}", f"--training.steps={steps}"]
    else:
        command = ["--out", str(run), *([f"--config={config_file}"] if config_file else []), *flags]
    with subprocess.Popen([sys.executable, str(PROJECT / "train.py"), *command]) as training:
        try:
            status = training.wait()
        except KeyboardInterrupt:  # which the training has got too, and saves
            training.wait()
            raise
    if status:
        advice = "see its message above" if status == 2 else "give the command again to go on"
        raise UserError(f"the training of {run} ended with exit status {status}: {advice}")


if __name__ == "__main__":
    with user_errors_exit():
        main(sys.argv[1:])
