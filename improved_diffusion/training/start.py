"""From a command line to a run: which settings, which data, which directory, new or resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from jsonargparse import ArgumentParser, Namespace

from improved_diffusion.checkpoint_file import read_checkpoint
from improved_diffusion.config import Config, ModelConfig, TrainingConfig
from improved_diffusion.config_file import run_type
from improved_diffusion.data.image_set import ImageSet, is_image_set
from improved_diffusion.data.packing import pack_synthetic
from improved_diffusion.data.shards import ShardedSet
from improved_diffusion.errors import UserError
from improved_diffusion.provenance import provenance_entry
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.runtime.devices import Processes, choose_precision
from improved_diffusion.settings import parse_arguments, read_settings, to_settings
from improved_diffusion.training.evaluation import Evaluator
from improved_diffusion.training.optimization import learning_rate
from improved_diffusion.training.trainer import Trainer

FOOD101, SYNTHETIC = Path("data/food101-64"), Path("data/synthetic-64")
SYNTHETIC_PER_CLASS, SYNTHETIC_TEST_PER_CLASS = 500, 100

TRAINING_STATE = ("step", "model", "ema", "optimizer", "timestep_sampler", "class_names", "data_hash")

# What a resumed run may change, by group ("" for what is in none); all else decides what the run computes.
CHANGEABLE = {
    "": ("data",),
    "training": (
        *("steps", "cooldown", "accumulation", "log_every", "save_every", "keep_checkpoints"),
        *("compile", "cuda_graph", "gradient_checkpointing", "shard_optimizer"),
    ),
    "evaluation": tuple(f.name for f in dataclasses.fields(Config().evaluation)),
    "sampling": tuple(f.name for f in dataclasses.fields(Config().sampling)),
}

# And beside those one that goes on from a checkpoint that is named: a run whose loss was not finite needs other ones.
CHANGEABLE_FROM_A_CHECKPOINT = {**CHANGEABLE, "training": (*CHANGEABLE["training"], "lr", "grad_clip")}


@dataclass(frozen=True)
class Defaults:
    """What `train.py` takes where it is not told: the config, the data, and why."""

    config: Path
    data: Path
    reason: str


def choose_defaults(loss: str | None, project: Path) -> Defaults:
    """The replication config where Food101 and a CUDA device are at hand, and the demo elsewhere."""
    has_food101, has_cuda = is_image_set(FOOD101), torch.cuda.is_available()
    if has_food101 and has_cuda:
        name = "food101_mse.yaml" if loss == "mse" else "food101_hybrid.yaml"
        return Defaults(project / "configs" / name, FOOD101, f"{FOOD101} is prepared and there is a CUDA device")
    if has_food101:
        return Defaults(project / "configs" / "demo.yaml", FOOD101, "there is no CUDA device")
    return Defaults(project / "configs" / "demo.yaml", SYNTHETIC, f"{FOOD101} is not prepared")


def with_data(config: Config, defaults: Defaults, processes: Processes) -> Config:
    """The settings with the default data where they name none. The embedded set is drawn if it is not there yet."""
    data = config.data if config.data is not None else str(defaults.data)  # maybe a URL, which is no Path
    if Path(data) == SYNTHETIC:
        if processes.is_first:
            _draw_embedded_set(SYNTHETIC)
        processes.wait()
    return dataclasses.replace(config, data=data)


def without_another_network(settings: dict[str, Any], kind: type[Config]) -> tuple[dict[str, Any], list[str]]:
    """The settings in a file, for a network of another kind perhaps than the file's: without what it says under `model`
    of how large its own is. And the names of what was left out."""
    if run_type(settings) is kind or "model" not in settings:
        return settings, []
    for_all = {field.name for field in dataclasses.fields(ModelConfig)} - {"num_heads"}
    kept = {name: value for name, value in settings["model"].items() if name in for_all}
    return {**settings, "model": kept}, [name for name in settings["model"] if name not in kept]


def with_precision(config: Config, processes: Processes) -> tuple[Config, str]:
    """The settings with `training.precision: auto` settled by the first process's device, so that the run records it
    and keeps it wherever it is resumed; and a line that says why."""
    precision, why = processes.gather(choose_precision(config.training.precision, processes.device))[0]
    return dataclasses.replace(config, training=dataclasses.replace(config.training, precision=precision)), why


def _draw_embedded_set(data: Path) -> None:
    """Draw it unless it is there. Of two commands that want it the second waits for the first."""
    data.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(data.with_name(f".{data.name}.lock")):
        if not data.exists():
            print(f"drawing the embedded image set into {data}", flush=True)
            pack_synthetic(data, SYNTHETIC_PER_CLASS, SYNTHETIC_TEST_PER_CLASS, seed=0)


@contextlib.contextmanager
def held_by_first(
    run: contextlib.AbstractContextManager[RunDirectory], is_first: bool, broadcast: Callable[[Any], Any]
) -> Iterator[RunDirectory]:
    """The directory `run`, which the first process holds for all of them while the block lasts.

    Args:
        run: from `new_run`, or `RunDirectory.held`.
        is_first: whether this process is the first.
        broadcast: gives every process the first one's value.

    Raises:
        UserError: what kept the first process from holding it, in all of them.
    """
    with contextlib.ExitStack() as stack:
        held: RunDirectory | UserError | None = None
        if is_first:
            try:
                held = stack.enter_context(run)
            except UserError as error:
                held = error
        held = broadcast(held)
        if isinstance(held, UserError):
            raise held
        yield held


@contextlib.contextmanager
def new_run(out: str | None, name: str) -> Iterator[RunDirectory]:
    """The directory of a new run, `held` while the block lasts: `out`, or a new one under runs/ whose name starts with
    `name`.

    Raises:
        UserError: `out` already holds a run, or another process holds it.
    """
    with RunDirectory(Path(out) if out is not None else _new_directory(name)).held() as run:
        if holds_run(run.path):
            raise UserError(f"{out} already holds a run: go on with --resume {out}, or choose another --out")
        if run.config_file.is_file() and "provenance" not in read_settings(run.config_file):
            raise UserError(f"{run.config_file} is no run's and would be overwritten: choose another --out")
        yield run


def holds_run(path: str | Path) -> bool:
    """Whether there is a run to go on with at `path`: one that has saved a checkpoint."""
    return bool(RunDirectory(Path(path)).checkpoint_files())


def _new_directory(name: str) -> Path:
    """runs/NAME, NAME-2, NAME-3, ...: the first that is not there yet, made at once, so that it is no one else's."""
    path, number = Path("runs") / name, 1
    try:
        path.parent.mkdir(exist_ok=True)
        while True:
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
            number += 1
            path = path.with_name(f"{name}-{number}")
    except OSError as error:
        raise UserError(f"could not make {path}: {error.strerror}") from error


def run_to_resume(path: str, kind: type = Config) -> RunDirectory:
    """The run at `path`, or of the checkpoint at `path`.

    Raises:
        UserError: no run, or none that can be resumed.
    """
    run = RunDirectory(Path(path).parent.parent if path.endswith(".pt") else Path(path))
    if kind is Config and run.read_config(kind).data is None:
        raise UserError(
            f"{run.path} was imported or exported: it holds a model to sample from, and no run to go on with"
        )
    return run


def settings_and_run(
    kind: type, parser: ArgumentParser, arguments: list[str], options: Namespace
) -> tuple[Any, RunDirectory | None]:
    """The settings of the flags in `arguments` and, beneath them, of `--config`, or of the run that `--resume` names;
    and that run.

    Args:
        kind: the dataclass of the settings.
        parser: see `run_parser`.
        arguments, options: before and after `parse_run`.

    Raises:
        UserError: as `run_to_resume` and `parse_arguments` do.
    """
    resumed = None if options.resume is None else run_to_resume(options.resume, kind)
    file = options.config if resumed is None else resumed.config_file
    settings = {} if file is None else read_settings(file)
    return to_settings(kind, parser, parse_arguments(parser, arguments, settings, str(file))), resumed


def state_to_resume(run: RunDirectory, path: str, keys: tuple[str, ...] = TRAINING_STATE) -> dict[str, Any]:
    """The state in the checkpoint at `path`, or in the latest one of the run there.

    Raises:
        UserError: no checkpoint, a damaged one, or one that lies elsewhere or under another step's name.
    """
    file = Path(path) if path.endswith(".pt") else run.latest_checkpoint()
    state = read_checkpoint(file, keys)
    named = run.checkpoint_file(state["step"])
    if file.resolve() != named.resolve():
        raise UserError(f"{file} is the checkpoint of step {state['step']}: to go on from it, copy it to {named}")
    return state


def require_same_run(old: Any, new: Any, changeable: Mapping[str, Collection[str]] = CHANGEABLE) -> None:
    """A resumed run keeps the settings that decide what it computes: all but the `changeable`, and an `auto` of old
    runs, which did not record what it came to.

    Raises:
        UserError: one of them differs; the message names it.
    """
    for field in dataclasses.fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if not dataclasses.is_dataclass(before):
            pairs = [(field.name, before, after)] if field.name not in changeable.get("", ()) else []
        else:
            fixed = [f.name for f in dataclasses.fields(before) if f.name not in changeable.get(field.name, ())]
            pairs = [(f"{field.name}.{name}", getattr(before, name), getattr(after, name)) for name in fixed]
        for name, was, now in pairs:
            if was not in (now, "auto"):
                raise UserError(
                    f"a resumed run cannot change {name} from {was} to {now}: start a new run, or leave the setting out"
                )


def require_same_learning_rates(old: TrainingConfig, new: TrainingConfig, step: int) -> None:
    """A run that goes on at `step` took the steps until then at the learning rates that `new` would have given them:
    another number of steps may mean another schedule. Another `lr`, where one may be given, is meant for what follows.

    Raises:
        UserError: it did not; the message names the step up to which it did.
    """
    old = dataclasses.replace(old, lr=new.lr)
    require_same_rates(functools.partial(learning_rate, old), functools.partial(learning_rate, new), step)


def require_same_rates(old: Callable[[int], float], new: Callable[[int], float], taken: int) -> None:
    """Both give the same learning rates of the first `taken` steps.

    Raises:
        UserError: they do not; the message names the step up to which they do.
    """
    for step in range(taken):
        was, now = old(step), new(step)
        if was != now:
            raise UserError(
                f"with so many training steps, or this cool-down, the learning rate of step {step} would have been "
                f"{now:.3g} and not {was:.3g}: turn back to a checkpoint of at most {step} steps, --resume "
                "CHECKPOINT.pt, or leave them as they were"
            )


def require_steps_ahead(steps: int, taken: int) -> None:
    """A run that has taken `taken` steps is to take `steps` in all.

    Raises:
        UserError: those are fewer.
    """
    if steps < taken:
        raise UserError(
            f"the run has taken {taken} steps already, and the {steps} of training.steps are all that it is to take: "
            "give more, or turn back to an earlier checkpoint, --resume CHECKPOINT.pt"
        )


def require_same_data(state: dict[str, Any], image_set: ImageSet | ShardedSet) -> None:
    """A resumed run sees the images it has seen before.

    Raises:
        UserError: the image set's content differs.
    """
    if state.get("data_hash") != image_set.content_hash:
        raise UserError(
            f"{image_set.path} is not the image set that the run was trained on: its content hash is "
            f"{image_set.content_hash[:12]}, and the checkpoint's is {str(state.get('data_hash'))[:12]}"
        )


def summary(trainer: Trainer, evaluator: Evaluator, image_set: ImageSet | ShardedSet, run: RunDirectory) -> str:
    """What is about to run, in a few lines."""
    config = trainer.config
    training, classes = config.training, len(image_set.class_names)
    epochs = training.steps * training.batch_size / len(image_set)
    parameters = sum(p.numel() for p in trainer.network.parameters())
    measured = "a sample grid"
    if evaluator.metric:
        measured = f"{evaluator.metric} of {config.evaluation.samples_per_class} images per class "
        measured += f"against the {len(evaluator.reference):,} of {evaluator.reference.path}"
    return "\n".join(
        (
            f"data: {image_set.path}, {len(image_set):,} images of {classes} classes",
            f"model: {parameters / 1e6:.2f} M parameters, {config.loss} loss, T = {config.diffusion.timesteps}",
            f"training: steps {trainer.step:,} to {training.steps:,} of {training.batch_size} images "
            f"({epochs:.1f} epochs), on {trainer.processes.device}, {trainer.processes.world_size} process(es)",
            *([f"step: {trainer.execution}"] if training.compile or training.cuda_graph else []),
            f"evaluation: every {config.evaluation.every:,} steps, {measured}",
            f"run: {run.path}",
        )
    )


def record_provenance(
    run: RunDirectory, config: Config, image_set: ImageSet | ShardedSet, processes: Processes
) -> None:
    """Write config.yaml: the settings, and under `provenance` an entry for each time the run was started or resumed."""
    data = {"path": str(image_set.path), "split": image_set.split, "content_hash": image_set.content_hash}
    entry = provenance_entry(data, processes.device, processes.world_size, ("torch", "torchvision", "numpy"))
    run.write_config(config, [*run.read_provenance(), entry])
