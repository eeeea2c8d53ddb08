"""Sweeps through the command line: the grid, its scores, and going on with what is there."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState  # noqa: E402

from improved_diffusion.errors import UserError  # noqa: E402
from improved_diffusion.personalize.commands import sweep as sweep_command  # noqa: E402
from improved_diffusion.personalize.generate import Sampling, draw  # noqa: E402
from improved_diffusion.personalize.measuring.choice import on_front  # noqa: E402
from improved_diffusion.personalize.models.adapters import set_scales  # noqa: E402
from improved_diffusion.personalize.models.base import load_base  # noqa: E402
from improved_diffusion.personalize.models.tuned import load_run  # noqa: E402
from improved_diffusion.personalize.studies import sweep as sweep_module  # noqa: E402
from improved_diffusion.personalize.studies.sweep_config import SweepConfig, TrainGrid  # noqa: E402
from improved_diffusion.run_directory import RunDirectory  # noqa: E402

GRID = (
    "--draw.unet_scales=[0,1]",
    "--draw.text_encoder_scales=[0.5]",
    "--draw.guidance_scales=[3,7.5]",
    "--draw.seeds=[4,5]",
    "--draw.steps=2",
    '--draw.prompts=["a {token} {class}","a {class} in the snow"]',
)
ONE_POINT = ("--draw.unet_scales=[1]", "--draw.guidance_scales=[3]", "--draw.seeds=[4]")
ONE_PICTURE = (*ONE_POINT, '--draw.prompts=["a {token} {class}"]')


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


@pytest.fixture(scope="module")
def flags_of_all(trained_run, tiny_judges) -> tuple[str, ...]:
    """What all sweeps are told: the run, the judges and a grid of 16 pictures."""
    return (f"--runs=[{trained_run}]", f"--clip={tiny_judges['clip']}", f"--vision={tiny_judges['dino']}", *GRID)


@pytest.fixture
def sweep(run_script, flags_of_all, tmp_path):
    """Sweep into `tmp_path / "sweep"`; later flags take the place of earlier ones."""

    def run(*flags: str):
        return run_script("personalize.py", "sweep", f"--out={tmp_path / 'sweep'}", *flags_of_all, *flags)

    return run


@pytest.fixture(scope="module")
def whole_grid(flags_of_all, tmp_path_factory) -> Path:
    """What a sweep of all 16 pictures leaves; to be read only."""
    out = tmp_path_factory.mktemp("whole") / "sweep"
    sweep_command.run([f"--out={out}", *flags_of_all])
    return out


@pytest.fixture
def after_the_whole_grid(whole_grid, tmp_path) -> Path:
    """Its copy where `sweep` goes on with it."""
    return shutil.copytree(whole_grid, tmp_path / "sweep")


def test_every_point_is_drawn_scored_and_shown(whole_grid):
    rows, summary = rows_of(whole_grid / "scores.csv"), rows_of(whole_grid / "summary.csv")
    assert len(rows) == 16
    assert {row["prompt"] for row in rows} == {"a sks ball", "a ball in the snow"}
    assert len({(row["unet_scale"], row["guidance_scale"], row["prompt"], row["seed"]) for row in rows}) == 16
    for point in summary:
        own = [row for row in rows if all(row[key] == point[key] for key in ("unet_scale", "guidance_scale"))]
        for score in ("clip_t", "clip_i", "likeness", "copying"):
            assert float(point[score]) == pytest.approx(np.mean([float(row[score]) for row in own]), abs=1e-5)
            assert float(point[f"{score}_low"]) <= float(point[score]) <= float(point[f"{score}_high"])
    front = on_front([(float(row["likeness"]), float(row["clip_t"])) for row in summary])
    assert [row["on_front"] == "True" for row in summary] == front.tolist()
    for picture in ("sheet.png", "pareto.png", "sheets/00.png", "sheets/01.png"):
        assert Image.open(whole_grid / picture).size > (100, 100)


def test_axes_that_go_together(sweep, tmp_path):
    """Two points, not four; and the means of each prompt."""
    outcome = sweep("--draw.zip=[unet_scales,guidance_scales]", "--draw.seeds=[4]")
    assert outcome.code == 0, outcome.err
    rows = rows_of(tmp_path / "sweep" / "prompts.csv")
    points = [(row["unet_scale"], row["guidance_scale"], row["prompt"], row["n"]) for row in rows]
    prompts = ("a sks ball", "a ball in the snow")
    assert points == [(*point, prompt, "1") for point in (("0.0", "3.0"), ("1.0", "7.5")) for prompt in prompts]
    scores = rows_of(tmp_path / "sweep" / "scores.csv")
    found, expected = ([float(row["clip_t"]) for row in table] for table in (rows, scores))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--draw.zip=[unet_scales,text_encoder_scales]",),
            "as many values each: unet_scales 2, text_encoder_scales 1",
        ),
        (("--draw.zip=[unet_scales]",), "names unet_scales alone"),
        (
            ("--draw.zip=[unet_scales,guidance_scales]", "--draw.unet_scales=[1,1]", "--draw.guidance_scales=[3,3]"),
            "twice",
        ),
    ],
)
def test_axes_that_cannot_go_together(sweep, flags, message):
    outcome = sweep(*flags)
    assert outcome.is_one_clear_line()
    assert message in outcome.err


def test_settings_of_runs_that_go_together():
    grid = {"seed": [1, 2], "training.lr": [0.1, 0.2], "subject.token": ["sks", "hta"]}
    found = [tuple(values.values()) for values in TrainGrid(None, grid, ("seed", "subject.token")).combinations()]
    assert found == [(1, 0.1, "sks"), (2, 0.1, "hta"), (1, 0.2, "sks"), (2, 0.2, "hta")]
    assert len(TrainGrid(None, grid).combinations()) == 8
    with pytest.raises(UserError, match="which is not in the grid"):
        TrainGrid(None, grid, ("seed", "rank"))


def test_a_picture_can_be_drawn_again_from_its_row(whole_grid, trained_run):
    row = rows_of(whole_grid / "scores.csv")[-1]
    tuned = load_run(RunDirectory(trained_run), row["checkpoint"])
    set_scales(tuned.base, float(row["unet_scale"]), float(row["text_encoder_scale"]))
    sampling = Sampling(2, float(row["guidance_scale"]))
    (again,) = draw(tuned.base, [row["prompt"]], [int(row["seed"])], sampling)
    found = np.asarray(Image.open(whole_grid / row["file"]), dtype=np.int16)
    assert np.abs(found - np.asarray(again, dtype=np.int16)).max() <= 1  # alone, and in a batch of four


def test_scale_zero_is_the_base(sweep, tiny_bases, tmp_path):
    sweep(*ONE_PICTURE, "--draw.unet_scales=[0,1]", "--draw.text_encoder_scales=[0]")
    rows = rows_of(tmp_path / "sweep" / "scores.csv")
    pictures = {row["unet_scale"]: Image.open(tmp_path / "sweep" / row["file"]).tobytes() for row in rows}
    (expected,) = draw(load_base(str(tiny_bases["sd"])), ["a sks ball"], [4], Sampling(2, 3.0))
    assert pictures["0.0"] == expected.tobytes()
    assert pictures["1.0"] != expected.tobytes()


def test_interrupted_it_draws_only_what_is_missing(sweep, after_the_whole_grid):
    pictures = sorted((after_the_whole_grid / "pictures").rglob("*.png"))
    times = {file: file.stat().st_mtime_ns for file in pictures}
    pictures[3].unlink()
    assert sweep().code == 0
    changed = [file for file in pictures if file.stat().st_mtime_ns != times[file]]
    assert changed == [pictures[3]]


def test_changed_settings_do_not_find_old_pictures(sweep, after_the_whole_grid):
    """Other steps, and prompts that have changed places."""
    first = {row["file"] for row in rows_of(after_the_whole_grid / "scores.csv")}
    for changed in ("--draw.steps=3", '--draw.prompts=["a {class} in the snow","a {token} {class}"]'):
        assert sweep(*ONE_POINT, changed).code == 0
        assert not first & {row["file"] for row in rows_of(after_the_whole_grid / "scores.csv")}


@pytest.fixture
def study(tiny_bases, tiny_judges, photos, tmp_path) -> Callable[..., tuple[str, ...]]:
    """Arguments of a sweep that trains runs, one for each point of a grid."""

    def write(grid: dict[str, list], **watch: object) -> tuple[str, ...]:
        settings = {
            "base": str(tiny_bases["sd"]),
            "data": str(photos),
            "subject": {"token": "sks", "class_name": "ball"},
            "training": {"steps": 1},
            "watch": {"clip": None, "vision": None, "steps": 1, "seeds": [0], "class_prompts": [], **watch},
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
        study = {
            "clip": str(tiny_judges["clip"]),
            "vision": None,
            "train": {"config": "run.yaml", "grid": grid},
            "draw": {"prompts": ["a {token} {class}"], "seeds": [0], "steps": 2},
        }
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
        return f"--config={tmp_path / 'study.yaml'}", f"--out={tmp_path / 'out'}"

    return write


@pytest.mark.usefixtures("no_estimate")
def test_runs_are_trained_for_each_combination(run_script, start_script, study, tmp_path, monkeypatch):
    def run_in_fork(command: list[str]) -> subprocess.CompletedProcess:
        """In place of an interpreter of its own, which would take ten seconds to import what is imported here."""
        assert command[0] == sys.executable
        outcome = start_script(*command[1:]).finish()
        print(outcome.err, file=sys.stderr)
        return subprocess.CompletedProcess(command, outcome.code)

    monkeypatch.setattr(sweep_module, "subprocess", SimpleNamespace(run=run_in_fork))
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = (*study({"subject.token": ["sks", "oue"]}), "--", "--training.steps=2")
    outcome = run_script("personalize.py", "sweep", *arguments)
    assert outcome.code == 0, outcome.err
    rows = rows_of(tmp_path / "out" / "scores.csv")
    assert [(row["run"], row["prompt"]) for row in rows] == [("token-sks", "a sks ball"), ("token-oue", "a oue ball")]
    for run in (tmp_path / "out" / "runs").iterdir():
        lines = (run / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == 2
    settings = yaml.safe_load((tmp_path / "run.yaml").read_text())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**settings, "adapter": {"rank": 2}}))
    outcome = run_script("personalize.py", "sweep", *arguments)
    assert outcome.is_one_clear_line(), outcome.err
    assert "the file of the runs has changed" in outcome.err
    assert "adapter.rank" in outcome.err


def test_each_combination_is_a_run_of_its_own(study, tmp_path, monkeypatch):
    """Also where texts differ only in what no folder is called, and a setting that may be left out is."""
    commands = []

    def run(command: list[str]) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sweep_module, "subprocess", SimpleNamespace(run=run))
    prompts = ["a photo of {token}", "a photo, of {token}", "a photo of, {token}"]
    grid = {"subject.prompt": prompts, "training.min_snr_gamma": [None, 5]}
    study(grid)
    config = SweepConfig(train=TrainGrid("run.yaml", grid))
    runs = sweep_module.train_runs(config, tmp_path / "runs", tmp_path / "study.yaml", [])
    assert len(set(runs)) == len(commands) == 6
    assert sum("--training.min_snr_gamma=null" in command for command in commands) == 3


@pytest.mark.parametrize(
    ("grid", "watch", "message"),
    [
        ({"training.lr": [1e-4, -1]}, {}, "training.lr"),
        ({"subject.token": ["sks"]}, {"every": None}, "give --draw.checkpoints [latest]"),
    ],
)
def test_what_cannot_be_trained_or_drawn_is_said_before_the_first_run(
    run_script, study, tmp_path, grid, watch, message
):
    outcome = run_script("personalize.py", "sweep", *study(grid, **watch))
    assert outcome.is_one_clear_line(), outcome.err
    assert message in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--runs=[]",), "a sweep draws from runs that are there (runs), or trains them"),
        (("--runs=[nowhere]",), "no run directory at nowhere"),
        (("--draw.seeds=[]",), "draw.seeds must not be empty"),
        (("--draw.seeds=[1,1]",), "draw.seeds names something twice"),
        (('--draw.prompts=["a {colour} ball"]',), "only {token} and {class}"),
        (('--draw.checkpoints=["step_0000099.pt"]',), "no checkpoint at"),
        (("--runs=dog",), "runs must be a list in brackets, '[dog]' say, not dog"),
        (("--runs=[dog,dog]",), "runs names something twice"),
        (("--out={file}",), "is a file, and the results are a folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_clear_line(sweep, tmp_path, flags, message):
    (tmp_path / "file").write_text("mine")
    outcome = sweep(*(flag.replace("{file}", str(tmp_path / "file")) for flag in flags))
    assert outcome.is_one_clear_line(), outcome.err
    assert message in outcome.err


@pytest.fixture
def copied_run(trained_run, tmp_path):
    """Copy the run to `tmp_path / "copied"`, with other settings."""

    def copy(**changed) -> Path:
        run = shutil.copytree(trained_run, tmp_path / "copied")
        settings = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump({**settings, **changed}))
        return run

    return copy


@pytest.mark.parametrize("single_first", [True, False])
def test_scores_that_a_run_lacks_are_blanks(sweep, copied_run, trained_run, photos, tmp_path, single_first):
    """Of a single training image nobody can say what a copy would be."""
    (tmp_path / "one").mkdir()
    shutil.copy(photos / "0.png", tmp_path / "one")
    runs = [copied_run(data=str(tmp_path / "one")), trained_run]
    runs = runs if single_first else runs[::-1]
    outcome = sweep(f"--runs=[{runs[0]},{runs[1]}]", *ONE_PICTURE)
    assert outcome.code == 0, outcome.err
    out = tmp_path / "sweep"
    for table in ("scores.csv", "summary.csv"):
        for row in rows_of(out / table):
            assert (row["copying"] == "") == (row["run"] == "copied")
            assert float(row["likeness"])
    rows = [line.split() for line in outcome.out.splitlines() if "guidance" in line]
    assert sorted(len(row) for row in rows)[0] + 1 == sorted(len(row) for row in rows)[1]
    assert (out / "pareto.png").is_file()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base": "nowhere"}, "the base model nowhere does not exist"),
        ({"data": "nowhere"}, "there is no folder or parquet file of images at nowhere"),
        ({"adapter": {"rank": 4}}, "the weights are of another base or rank"),
        ({"adapter": {"dora": True}}, "the weights are of another base or method"),
        ({}, "is damaged"),
    ],
    ids=["base", "images", "rank", "method", "checkpoint"],
)
def test_what_is_wrong_with_the_last_run_is_said_before_the_first_is_drawn(
    sweep, copied_run, trained_run, tmp_path, changed, message
):
    run = copied_run(**changed)
    if not changed:
        for file in (run / "checkpoints").glob("step_*.pt"):
            file.write_bytes(file.read_bytes()[:1000])
    outcome = sweep(f"--runs=[{trained_run},{run}]")
    assert outcome.is_one_clear_line(), outcome.err
    assert message in outcome.err
    assert not (tmp_path / "sweep").exists()


def test_a_checkpoint_of_two_names_is_drawn_once(sweep, tmp_path):
    """The run has two checkpoints, and chose none as the best."""
    outcome = sweep(*ONE_PICTURE, '--draw.checkpoints=["latest","step_0000002.pt"]')
    assert outcome.code == 0, outcome.err
    assert [row["n"] for row in rows_of(tmp_path / "sweep" / "summary.csv")] == ["1"]


def test_training_images_that_have_gone(sweep, copied_run, tmp_path, photos):
    """A run that was copied without its photos is told where they are."""
    run = copied_run(data=str(tmp_path / "gone"))
    outcome = sweep(f"--runs=[{run}]")
    assert outcome.is_one_clear_line()
    assert f"there is no folder or parquet file of images at {tmp_path / 'gone'}" in outcome.err
    outcome = sweep(f"--runs=[{run}]", f"--data={photos}", *ONE_PICTURE)
    assert outcome.code == 0, outcome.err
