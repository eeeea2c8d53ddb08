"""Averages of a run's weights whose length is chosen when it is sampled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from improved_diffusion import load
from improved_diffusion.checkpoint_file import read_checkpoint
from improved_diffusion.errors import UserError
from improved_diffusion.run_directory import RunDirectory


@pytest.fixture(scope="module")
def averaged(train_tiny) -> Path:
    flags = ["--training.ema_lengths=[0.05, 0.1]", "--training.save_every=3", "--training.keep_checkpoints=1"]
    return train_tiny(*flags)


@pytest.fixture
def run(averaged, tmp_path) -> RunDirectory:
    """A run of 12 steps that kept averages of two lengths at four of them."""
    shutil.copytree(averaged, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def test_any_length_up_to_any_step(run, run_script, tmp_path):
    assert [file.name for file in run.averages_until(9)] == [f"step_{step:07d}.pt" for step in (3, 6, 9)]
    kept = read_checkpoint(run.latest_checkpoint())["power_ema"]["0.1"]
    model = load(run.path, device="cpu", ema_length=0.1)
    for name, weight in model.network.named_parameters():
        torch.testing.assert_close(weight, kept[name], rtol=2e-3, atol=1e-4)
    longer = load(run.path, device="cpu", ema_length=0.2)
    assert not torch.equal(next(longer.network.parameters()), next(model.network.parameters()))
    assert (longer.ema_length, longer.ema_rate) == (0.2, None)

    command = ["--run", run.path, "--ema-length", "0.2", "--n", "1", "--sampling-steps", "2"]
    outcome = run_script("sample.py", *command, "--out", tmp_path / "samples")
    assert outcome.code == 0, outcome.err
    assert '"ema_length": 0.2' in (tmp_path / "samples" / "manifest.json").read_text()


def test_a_run_that_is_turned_back_forgets_the_later_ones(run):
    assert len(run.averages_until(12)) == 4
    run.turn_to(6)
    assert [file.name for file in run.averages_until(12)] == ["step_0000003.pt", "step_0000006.pt"]


def test_what_cannot_be_made_is_refused(run, tiny_run):
    with pytest.raises(UserError, match="kept no averages up to step 1 .* training.ema_lengths"):
        load(tiny_run, device="cpu", ema_length=0.1)
    with pytest.raises(UserError, match="relative length of an average must be between 0 and 0.28"):
        load(run.path, device="cpu", ema_length=0.5)
    with pytest.raises(UserError, match="choose one average"):
        load(run.path, device="cpu", ema=0.9, ema_length=0.1)
    file = run.averages_until(3)[0]
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="step_0000003.pt is damaged"):
        load(run.path, device="cpu", ema_length=0.1)
