"""Every mistake of a user's is one clear line and exit status 2; nothing is lost or half-written."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit

PROJECT = Path(__file__).parent.parent


@pytest.fixture
def config(short_settings, tmp_path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(short_settings))
    return file


@pytest.fixture
def trained(finished_run, tmp_path) -> Path:
    """A copy of a run, to be spoilt."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def assert_refused(outcome, *words: str) -> None:
    assert outcome.is_one_clear_line(), outcome
    for word in words:
        assert word in outcome.err, outcome.err


def test_a_missing_config(run_script, tmp_path):
    assert_refused(run_script("train.py", "--config", tmp_path / "nowhere.yaml"), "nowhere.yaml")


@pytest.mark.parametrize("text", ["loss: [", "- 1\n- 2\n", "\x00\x01", "loss: 2026-99-99", "[" * 9999])
def test_a_config_that_is_no_yaml_mapping(run_script, tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    assert_refused(run_script("train.py", "--config", tmp_path / "bad.yaml"), "bad.yaml")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lose": "mse"}, ["lose"]),
        ({"training": {"larning_rate": 1}}, ["training", "larning_rate"]),
        ({"training": {"lr": "fast"}}, ["training.lr", "fast"]),
        ({"training": {"steps": 1.5}}, ["training.steps", "1.5"]),
        ({"training": 5}, ["training"]),
        ({"loss": "mean"}, ["loss", "mean"]),
        ({"diffusion": {"timesteps": 0}}, ["diffusion.timesteps", "0"]),
        ({"diffusion": {"timesteps": 10}, "sampling": {"steps": 11}}, ["sampling.steps", "11", "10"]),
        ({"model": {"image_size": 16, "num_channels": 10, "num_heads": 4}}, ["model"]),
        ({"model": {"image_size": 15}}, ["model"]),
        ({"data": "nowhere"}, ["nowhere"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"evaluation": {"every": None}}, ["evaluation.every cannot be null"]),
        ({"diffusion": {"prediction": None}}, ["diffusion.prediction cannot be null"]),
        ({"training": {"batch_size": 4, "ema_rates": [0.9, 0.9]}}, ["training.ema_rates"]),
        ({"model": {"image_size": 16, "num_channels": 2**40}}, ["model", "memory"]),
        ({"sampling": {"guidance_scale": 2.0}}, ["guidance_scale", "class_dropout"]),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be(run_script, short_settings, tmp_path, change, words):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**short_settings, **change}))
    outcome = run_script("train.py", "--config", file, "--out", tmp_path / "run")
    assert_refused(outcome, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--training.lr=abc"], ["training.lr", "abc"]),
        (["--training.larning=1"], ["larning"]),
        (["--resume", "nowhere", "--out", "elsewhere"], ["--resume"]),
        (["--diffusion.timesteps=0"], ["diffusion.timesteps"]),
        (["--training.step=4"], ["--training.step"]),
        (["--out="], ["--out is empty"]),
        (["--config="], ["--config is empty"]),
        (["--sampling.sampler=heun", "--sampling.options.churn=-5"], ["churn must be a number from 0 on"]),
    ],
)
def test_flags_that_cannot_be(run_script, config, flags, words):
    given = [] if "--resume" in flags else ["--config", config]
    assert_refused(run_script("train.py", *given, *flags), *words)


def test_an_image_set_whose_hash_does_not_match(run_script, config, tiny_set, tmp_path):
    copy = tmp_path / "set"
    shutil.copytree(tiny_set, copy)
    images = np.load(copy / "images.npy", mmap_mode="r+")
    images[0, 0, 0, 0] ^= 1
    images.flush()
    assert_refused(run_script("train.py", "--config", config, "--data", copy), "images.npy", "SHA-256")


@contextlib.contextmanager
def full_after(size: int) -> Iterator[None]:
    """A limit on the size of files is a full disk for who writes one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class TestRun:
    def test_new_run_beside_a_config_of_something_else(self, run_script, config, tmp_path):
        other = tmp_path / "out" / "config.yaml"
        other.parent.mkdir()
        for text in ("server: 1\n", "- a list\n", "a: [\n"):
            other.write_text(text)
            assert_refused(run_script("train.py", "--config", config, "--out", other.parent), str(other))
            assert other.read_text() == text

    def test_new_run_in_a_taken_directory(self, run_script, config, trained):
        assert_refused(run_script("train.py", "--config", config, "--out", trained), str(trained), "--resume")

    def test_resume_of_no_run(self, run_script, tmp_path):
        assert_refused(run_script("train.py", "--resume", tmp_path / "nowhere"), "nowhere")
        (tmp_path / "empty").mkdir()
        assert_refused(run_script("train.py", "--resume", tmp_path / "empty"), "empty")

    def test_resume_without_checkpoints(self, run_script, trained):
        shutil.rmtree(trained / "checkpoints")
        assert_refused(run_script("train.py", "--resume", trained), str(trained), "no checkpoints")

    def test_resume_with_another_architecture(self, run_script, trained):
        outcome = run_script("train.py", "--resume", trained, "--model.num_channels=16")
        assert_refused(outcome, "model.num_channels", "16", "8")
        text = (trained / "config.yaml").read_text()
        (trained / "config.yaml").write_text(text.replace("num_channels: 8", "num_channels: 16"))
        assert_refused(run_script("train.py", "--resume", trained), "another architecture")

    def test_resume_on_other_images(self, run_script, trained, tiny_set):
        outcome = run_script("train.py", "--resume", trained, "--data", tiny_set / "test")
        assert_refused(outcome, "not the image set")

    def test_a_checkpoint_cut_in_half(self, run_script, trained):
        file = trained / "checkpoints" / "step_0000002.pt"
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        for script, flag in (("train.py", "--resume"), ("sample.py", "--run")):
            assert_refused(run_script(script, flag, trained), str(file), "damaged", "step_0000001.pt")
        outcome = run_script("train.py", "--resume", trained / "checkpoints" / "step_0000001.pt")
        assert outcome.code == 0, outcome.err

    def test_a_checkpoint_that_is_something_else(self, run_script, trained):
        file = trained / "checkpoints" / "step_0000002.pt"
        file.write_text("not a checkpoint")
        assert_refused(run_script("sample.py", "--run", trained), str(file), "damaged")

    def test_a_class_that_does_not_exist(self, run_script, trained):
        outcome = run_script("sample.py", "--run", trained, "--class", "creme brule")
        assert_refused(outcome, "creme brule", "near it: creme_brulee")

    def test_more_sampling_steps_than_timesteps(self, run_script, trained):
        assert_refused(run_script("sample.py", "--run", trained, "--sampling-steps", 11), "11", "10 timesteps")

    @pytest.mark.parametrize(
        "flags",
        [
            ["--n", 0],
            ["--n", "x"],
            ["--sampling-steps", 0],
            ["--batch-size", 0],
            ["--sampler", "x"],
            ["--guidance-scale", 2],
            ["--guidance-interval", 0.3, 5],
            ["--checkpoint", "step_0000007.pt"],
            ["--seed", -1],
            ["--seed", 2**63],
        ],
        ids=str,
    )
    def test_sampling_that_cannot_be(self, run_script, trained, flags, tmp_path):
        assert_refused(run_script("sample.py", "--run", trained, "--out", tmp_path / "out", *flags))
        assert not (tmp_path / "out").exists()

    def test_a_disk_that_is_full(self, trained):
        from improved_diffusion.checkpoint_file import read_checkpoint
        from improved_diffusion.run_directory import RunDirectory

        run = RunDirectory(trained)
        before = sorted(run.checkpoints.iterdir())
        state = read_checkpoint(run.latest_checkpoint())
        with full_after(20_000), pytest.raises(UserError, match="could not write"):
            run.save_checkpoint({**state, "step": 3}, keep=1)
        assert sorted(run.checkpoints.iterdir()) == before
        assert read_checkpoint(run.latest_checkpoint())["step"] == 2

    @pytest.mark.parametrize(("length", "file"), [(1, "tensorboard"), (3000, "metrics.jsonl")])
    def test_a_disk_that_is_full_for_the_record(self, tmp_path, capfd, length, file):
        from improved_diffusion.run_directory import RunDirectory
        from improved_diffusion.training.run_log import RunLog

        record = {f"{'x' * length}{number}": 1.0 for number in range(200)}
        log = RunLog(RunDirectory(tmp_path / "run"), 0)
        with full_after(6000), pytest.raises(UserError, match=f"could not write .*{file}"), log:
            log.write_metrics({"step": 1, **record})
        assert capfd.readouterr().err == ""


def test_weights_that_fail_their_hash(run_script, tiny_set, config, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"not the weights")
    outcome = run_script("fid.py", tiny_set, tiny_set / "test", "--weights", tmp_path / "weights.pth")
    assert_refused(outcome, "weights.pth", "SHA-256")
    flags = ["--evaluation.features=64", f"--evaluation.weights={tmp_path / 'weights.pth'}"]
    assert_refused(run_script("train.py", "--config", config, "--out", tmp_path / "run", *flags), "weights.pth")


def test_an_interruption_exits_130():
    with pytest.raises(SystemExit) as stop, user_errors_exit():
        raise KeyboardInterrupt
    assert stop.value.code == 130


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory.\nTried 8 TiB")])
def test_a_want_of_memory_exits_2(capsys, error):
    with pytest.raises(SystemExit) as stop, user_errors_exit():
        raise error
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: out of memory")
    with pytest.raises(RuntimeError, match="a fault of ours"), user_errors_exit():
        raise RuntimeError("a fault of ours")


def test_a_path_that_the_system_refuses_is_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop, user_errors_exit():
        (tmp_path / ("x" * 300)).read_text()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path}")
    assert err.endswith("x: File name too long\n")


def test_a_message_of_several_lines_becomes_one(capsys):
    with pytest.raises(SystemExit) as stop, user_errors_exit():
        raise UserError("first\n  second")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: first second\n"


def test_a_flag_that_does_not_exist():
    with pytest.raises(UserError, match="--nonsense"):
        ArgumentParser(prog="x").parse_args(["--nonsense"])
