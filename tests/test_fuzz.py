"""Whatever lies in a file of settings, a checkpoint or a set of images: it works, or one clear line says why not."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import shutil
import typing
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from improved_diffusion.config import Config
from improved_diffusion.data import open_image_set
from improved_diffusion.data.labelled_files import labelled_folder
from improved_diffusion.errors import user_errors_exit
from improved_diffusion.metrics.images.opening import open_source
from improved_diffusion.metrics.statistics import FeatureStatistics, is_statistics_file
from improved_diffusion.personalize.config import PersonalizeConfig
from improved_diffusion.personalize.data.crops import buckets
from improved_diffusion.personalize.data.stream import MicroBatchStream
from improved_diffusion.personalize.training.budget import plan
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.runtime.devices import Processes
from improved_diffusion.sampling.loading import load
from improved_diffusion.settings import load_settings
from improved_diffusion.training.evaluation import Evaluator
from improved_diffusion.training.loop import TrainingLoop
from improved_diffusion.training.start import require_same_data, run_to_resume, state_to_resume
from improved_diffusion.training.trainer import Trainer

CPU = Processes(torch.device("cpu"))


def fuzz(examples: int) -> Callable:
    """The same examples each time, each of which may take as long as it does."""
    fixtures = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=fixtures
    )


@contextlib.contextmanager
def works_or_says_why_not() -> Iterator[None]:
    """Anything but a success, or one line and exit status 2, goes through as it is."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()), user_errors_exit():
            yield
    except SystemExit as stop:
        if stop.code != 2:
            raise
        said = [line for line in errors.getvalue().splitlines() if line.startswith("error: ")]
        assert len(said) == 1, errors.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# Settings

HUGE = st.sampled_from([2**40, 2**62, 10**30, -(2**40), 1e30, -1e300])
PLAIN = st.none() | st.booleans() | st.integers(-3, 40) | HUGE | st.floats() | st.text(max_size=5)
HOSTILE = PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(st.text(max_size=3), PLAIN, max_size=2)


def paths_of(kind: type) -> list[tuple[str, ...]]:
    """Of all settings, and of their groups."""
    paths: list[tuple[str, ...]] = []
    for name, hint in typing.get_type_hints(kind).items():
        paths.append((name,))
        if dataclasses.is_dataclass(hint):
            paths += [(name, *path) for path in paths_of(hint)]
    return paths


def changes_of(kind: type, most: int = 2) -> st.SearchStrategy[dict]:
    return st.dictionaries(st.sampled_from(paths_of(kind)), HOSTILE, min_size=1, max_size=most)


def changed(plain: dict[str, Any], changes: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    plain = copy.deepcopy(plain)
    for path, value in changes.items():
        group = plain
        for name in path[:-1]:
            group = group.setdefault(name, {})
            if not isinstance(group, dict):
                break
        else:
            group[path[-1]] = value
    return plain


@fuzz(60)
@given(changes=changes_of(Config))
@example(changes={("evaluation", "every"): None})
@example(changes={("evaluation", "seed"): None})
@example(changes={("diffusion", "timesteps"): None})
@example(changes={("diffusion", "prediction"): None})
@example(changes={("model", "num_channels"): 2**40})
@example(changes={("training", "batch_size"): 2**40})
def test_settings_of_a_run(changes, short_settings, tiny_set, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(changed(short_settings, changes)))
    with works_or_says_why_not():
        config = load_settings(Config, file)
        image_set = open_image_set(config.data or tiny_set)
        trainer = Trainer(config, image_set, CPU)
        trainer.train_step(*trainer.stream.batch(0))
        Evaluator(config, image_set, CPU)


@fuzz(60)
@given(changes=changes_of(PersonalizeConfig))
@example(changes={("watch", "seeds"): None})
@example(changes={("training", "batch_size"): None})
def test_settings_of_fine_tuning(changes, tmp_path):
    plain = {
        "base": "base",
        "data": "data",
        "training": {"steps": 2},
        "subject": {"token": "sks", "class_name": "dog"},
        "images": {"resolution": 64},
    }
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(changed(plain, changes)))
    with works_or_says_why_not():
        config = load_settings(PersonalizeConfig, file)
        config.subject.fill(config.subject.prompt)
        sizes = buckets(config.images.resolution or 64, config.images.buckets)
        stream = MicroBatchStream(sizes[:1] * 5, config.images.repeats, config.training.batch_size, config.seed)
        plan(stream, config.training, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints and what lies beside them


@pytest.fixture
def spoilt(finished_run, tmp_path) -> Callable[[], RunDirectory]:
    """A fresh copy of a run, to be spoilt."""

    def make() -> RunDirectory:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(finished_run, tmp_path / "run")
        return RunDirectory(tmp_path / "run")

    return make


def sample_and_resume(run: RunDirectory) -> None:
    """What sample.py and `train.py --resume` do with a run, to its next step."""
    with works_or_says_why_not():
        load(run.path, device=CPU.device).sample([0], show_progress=False)
    with works_or_says_why_not(), run_to_resume(str(run.path)).held():
        state = state_to_resume(run, str(run.path))
        config = run.read_config()
        image_set = open_image_set(config.data)
        trainer = Trainer(config, image_set, CPU)
        require_same_data(state, image_set)
        trainer.load_state_dict(state)
        run.write_config(config, run.read_provenance())
        with TrainingLoop(trainer, Evaluator(config, image_set, CPU), run, image_set).log:
            trainer.train_step(*trainer.stream.batch(trainer.step))
            trainer.terms.flush(CPU)


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Bits that flip, or an end that is lost."""
    flips = draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), max_size=4))
    left = draw(st.floats(0, 1)) if draw(st.booleans()) else 1.0

    def damage(content: bytes) -> bytes:
        spoilt = bytearray(content[: int(left * len(content))])
        for place, bit in flips:
            if spoilt:
                spoilt[int(place * len(spoilt))] ^= 1 << bit
        return bytes(spoilt)

    return damage


@fuzz(12)
@given(damage=damages())
def test_a_damaged_checkpoint(damage, spoilt):
    run = spoilt()
    file = run.latest_checkpoint()
    file.write_bytes(damage(file.read_bytes()))
    sample_and_resume(run)


@fuzz(10)
@given(damage=damages(), name=st.sampled_from(["config.yaml", "checkpoints/latest", "evaluations.jsonl"]))
def test_a_damaged_file_beside_it(damage, name, spoilt):
    run = spoilt()
    file = run.path / name
    file.write_bytes(damage(file.read_bytes()))
    sample_and_resume(run)


TENSORS = st.sampled_from(
    [torch.zeros(()), torch.zeros(3), torch.full((2, 2), float("nan")), torch.ones(1, dtype=torch.complex64)]
)


@pytest.fixture(scope="module")
def last_state(finished_run) -> dict[str, Any]:
    return torch.load(RunDirectory(finished_run).latest_checkpoint(), weights_only=True)


@fuzz(12)
@given(data=st.data())
def test_a_checkpoint_of_other_values(data, spoilt, last_state):
    """Another value at a random place, however deep."""
    run, state = spoilt(), copy.deepcopy(last_state)
    group, depth = state, data.draw(st.integers(1, 4))
    while True:
        key = data.draw(st.sampled_from(sorted(group) if isinstance(group, dict) else range(len(group))))
        depth -= 1
        if depth == 0 or not isinstance(group[key], (dict, list)) or not group[key]:
            break
        group = group[key]
    group[key] = data.draw(HOSTILE | TENSORS)
    torch.save(state, run.latest_checkpoint())
    sample_and_resume(run)


@pytest.mark.parametrize(("key", "value"), [("step", "x"), ("model", 3), ("class_names", 5)])
def test_a_checkpoint_of_other_types(spoilt, run_script, last_state, key, value):
    run = spoilt()
    torch.save({**last_state, key: value}, run.latest_checkpoint())
    for script, flag in (("train.py", "--resume"), ("sample.py", "--run")):
        outcome = run_script(script, flag, run.path)
        assert outcome.is_one_clear_line(), outcome.err
        assert f"is damaged: its {key} is" in outcome.err


# ----------------------------------------------------------------------------------------------------------------------
# Images


def image_bytes(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(buffer, form)
    return buffer.getvalue()


IMAGES = {form: image_bytes(form) for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}


def read_images(path: Path) -> None:
    """What fid.py and the packing do before the network, and before the decoding."""
    with works_or_says_why_not():
        if is_statistics_file(path):
            FeatureStatistics.load(path)
            return
        source = open_source(path)
        assert len(source.content_hash) == 64
        assert all(batch.images.dtype == np.uint8 for batch in source.batches(2))
    with works_or_says_why_not():
        labelled_folder(path)


@fuzz(60)
@given(damage=damages(), form=st.sampled_from(sorted(IMAGES)), zipped=st.booleans())
def test_broken_images(damage, form, zipped, tmp_path):
    folder = tmp_path / "images"
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in {"a/0": damage(IMAGES[form]), "a/1": IMAGES[form], "b/2": IMAGES["PNG"]}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(content)
    if zipped:
        archive = shutil.make_archive(str(tmp_path / "images"), "zip", folder)
        read_images(Path(archive))
    else:
        read_images(folder)


@fuzz(60)
@given(damage=damages(), kind=st.sampled_from(["zip", "npy", "npz"]))
def test_broken_archives_and_arrays(damage, kind, tmp_path):
    file = tmp_path / f"images.{kind}"
    array = np.zeros((3, 4, 4, 3), np.uint8)
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            for form, content in IMAGES.items():
                archive.writestr(f"a/{form}.{form.lower()}", content)
    elif kind == "npy":
        np.save(file, array)
    else:
        np.savez(file, images=array, labels=np.array(["a", "b", "a"]))
    file.write_bytes(damage(file.read_bytes()))
    read_images(file)


ARRAYS = st.sampled_from(
    [
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 4, 3), np.uint8),
        np.zeros((2, 0, 0, 3), np.uint8),
        np.zeros((2, 4, 4), np.uint8),
        np.full((2, 4, 4, 3), np.nan),
        np.array(5),
        np.array([0, 1]),
        np.array([-1, 2**60]),
        np.array(["a", "b"]),
        np.array([b"a", b"\xff"]),
        np.array([0.5, 1j]),
        np.array([], dtype=np.int64),
        np.zeros(2, dtype=[("a", int)]),
        np.eye(2),
        np.full((2, 2), np.inf),
    ]
)


@fuzz(60)
@given(arrays=st.dictionaries(st.sampled_from(["arr_0", "images", "labels", "class_names", "mu", "sigma"]), ARRAYS))
def test_arrays_of_other_kinds(arrays, tmp_path):
    file = tmp_path / "images.npz"
    np.savez(file, **arrays)
    read_images(file)


@fuzz(60)
@given(damage=damages(), name=st.sampled_from(["dataset.json", "images.npy", "labels.npy"]))
def test_a_broken_packed_set(damage, name, tiny_set, tmp_path):
    copied = tmp_path / "set"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(tiny_set, copied, ignore=shutil.ignore_patterns("test"))
    (copied / name).write_bytes(damage((copied / name).read_bytes()))
    read_images(copied)
