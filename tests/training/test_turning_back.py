"""A run that is turned back to an earlier checkpoint stands, at any moment, where it stood or where it is to stand."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from improved_diffusion.checkpoint_file import read_checkpoint
from improved_diffusion.data import open_image_set
from improved_diffusion.files import read_jsonl
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.training.loop import TrainingLoop
from improved_diffusion.training.run_log import RunLog

KILLED = 9
VALUES = {5: 10.0, 10: 8.0, 15: 9.0, 20: 7.0}  # of the evaluations


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """A run of 20 steps, whose best checkpoint is the last."""
    run = RunDirectory(tmp_path / "run")
    for step in VALUES:
        run.save_checkpoint({"step": step}, keep=9)
    run.point("best", run.checkpoint_file(20))
    run.metrics_file.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 23)))
    records = [{"step": step, "metric": "FID64", "value": value} for step, value in VALUES.items()]
    run.evaluations_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def turn_back(number: int, run: RunDirectory) -> None:
    """To step 10; the process ends before its `number`-th change of a file."""
    changes = iter(range(number))

    def dying(method):
        def change(*arguments, **settings):
            if next(changes, None) is None:
                os._exit(KILLED)
            return method(*arguments, **settings)

        return change

    Path.replace, Path.unlink = dying(Path.replace), dying(Path.unlink)
    RunLog(run, 10)


def kill_before_change(number: int, run: RunDirectory) -> bool:
    """Turn the run back in a process that dies before its `number`-th change of a file; whether it died."""
    process = multiprocessing.get_context("fork").Process(target=turn_back, args=(number, run))
    process.start()
    process.join(60)
    assert process.exitcode in (0, KILLED)
    return process.exitcode == KILLED


def stands_at(run: RunDirectory) -> tuple[Path, Path | None, list[int], list[int]]:
    """`latest`, `best`, and the steps recorded up to the latest: what a resume goes by."""
    latest = run.latest_checkpoint()
    last = read_checkpoint(latest)["step"]
    records = [read_jsonl(file) for file in (run.metrics_file, run.evaluations_file)]
    metrics, evaluations = ([r["step"] for r in of_file if r["step"] <= last] for of_file in records)
    return latest, run.pointed("best"), metrics, evaluations


def test_a_kill_at_any_moment_leaves_the_old_state_or_the_new(run, tmp_path):
    old = stands_at(run)
    new = (run.checkpoint_file(10), None, list(range(1, 11)), [5, 10])
    kills, seen = 0, []
    while True:
        copy = RunDirectory(tmp_path / f"killed{kills}")
        shutil.copytree(run.path, copy.path)
        died = kill_before_change(kills, copy)
        state = stands_at(copy)
        here = [(copy.path / file.relative_to(run.path) if file else None) for file in (*old[:2], *new[:2])]
        seen.append(state == (here[0], here[1], *old[2:]))
        assert seen[-1] or state == (here[2], here[3], *new[2:]), (kills, state)
        with RunLog(copy, read_checkpoint(copy.latest_checkpoint())["step"]):
            assert stands_at(copy) == state  # a resume stays there, and sets right what the kill left
        assert len(read_jsonl(copy.evaluations_file)) == len(state[3])
        assert (copy.checkpoints / "best").is_file() == (state[1] is not None)
        assert copy.checkpoint_files()[-1] == state[0]  # nothing of the way that was left
        if not died:
            break
        kills += 1
    assert kills >= 4  # latest, best, and two records
    assert seen[0]
    assert not seen[-1]
    assert seen == sorted(seen, reverse=True)


@pytest.mark.parametrize(("gone", "best"), [((), 10), ((10,), 15), ((5, 10, 15), None)], ids=str)
def test_the_best_is_then_the_best_of_those_that_are_left(run, tiny_trainer, tiny_set, gone, best):
    trainer = tiny_trainer()
    trainer.step = 15
    for step in gone:
        run.checkpoint_file(step).unlink()
    if best is None:
        run.save_checkpoint({"step": 15}, keep=9)
        run.evaluations_file.write_text("")
    loop = TrainingLoop(trainer, SimpleNamespace(metric="FID64", protocol={}), run, open_image_set(tiny_set))
    loop.log.tensorboard.close()
    assert loop.best_value == VALUES.get(best, float("inf"))
    assert run.pointed("best") == (run.checkpoint_file(best) if best else None)
    assert run.latest_checkpoint() == run.checkpoint_file(15)


def test_turning_back_on_the_command_line(run_script, tiny_config_file, tmp_path):
    run = RunDirectory(tmp_path / "run")
    flags = ["--training.save_every=3", "--training.keep_checkpoints=9"]
    assert run_script("train.py", "--config", tiny_config_file, "--out", run.path, *flags).code == 0
    before = read_jsonl(run.metrics_file)
    outcome = run_script("train.py", "--resume", run.checkpoint_file(6), "--training.steps=6")
    assert outcome.code == 0, outcome.err
    assert run.latest_checkpoint() == run.checkpoint_file(6)
    assert [record["step"] for record in read_jsonl(run.metrics_file)] == [3, 6]
    assert [record["step"] for record in read_jsonl(run.evaluations_file)] == [6]
    assert run_script("train.py", "--resume", run.path, "--training.steps=12").code == 0
    assert [record["loss"] for record in read_jsonl(run.metrics_file)] == [record["loss"] for record in before]


def test_what_was_saved_of_the_way_that_was_left_is_not_kept_in_place_of_the_new(run):
    run.turn_to(10)
    for step in (12, 14):
        run.save_checkpoint({"step": step}, keep=3)
    assert run.checkpoint_files() == [run.checkpoint_file(step) for step in (10, 12, 14)]


def test_fewer_steps_than_were_taken_are_refused(run_script, tiny_config_file, tmp_path):
    run = RunDirectory(tmp_path / "run")
    assert run_script("train.py", "--config", tiny_config_file, "--out", run.path, "--training.steps=3").code == 0
    before = run.config_file.read_text()
    outcome = run_script("train.py", "--resume", run.path, "--training.steps=2")
    assert outcome.is_one_clear_line(), outcome.err
    assert "has taken 3 steps already" in outcome.err
    assert run.config_file.read_text() == before


def test_a_checkpoint_elsewhere_or_under_another_steps_name(run_script, tiny_config_file, tmp_path):
    run = RunDirectory(tmp_path / "run")
    assert run_script("train.py", "--config", tiny_config_file, "--out", run.path, "--training.steps=3").code == 0
    (run.path / "kept").mkdir()
    for copy in (run.checkpoints / "mine.pt", run.path / "kept" / "step_0000003.pt"):
        shutil.copy(run.checkpoint_file(3), copy)
        outcome = run_script("train.py", "--resume", copy)
        assert outcome.is_one_clear_line(), outcome.err
        assert f"copy it to {run.checkpoint_file(3)}" in outcome.err
    assert run.latest_checkpoint() == run.checkpoint_file(3)
