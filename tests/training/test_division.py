"""Processes that divide moments and averages among themselves train as processes that do not, bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch

from improved_diffusion.checkpoint_file import read_checkpoint
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.runtime.devices import Processes
from improved_diffusion.training.division import Division

FLAGS = ["--training.optimizer=muon", "--training.ema_lengths=[0.1]", "--training.gradient_checkpointing=true"]
FLAGS += ["--training.grad_clip=0.5", "--training.save_every=2", "--training.log_every=2", "--training.steps=4"]


def flattened(value: object, name: str = "") -> dict[str, object]:
    """Tensors and values by where they are."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inside = [flattened(part, f"{name}/{key}") for key, part in pairs]
    return {place: leaf for part in inside for place, leaf in part.items()} if inside else {name: value}


def assert_same(one: Path, other: Path) -> None:
    states = [flattened(torch.load(file, weights_only=True)) for file in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, states[1][name]), name


def test_the_result_is_that_of_whole_optimizers(finish_script, run_script, tiny_config_file, tmp_path):
    runs = {name: RunDirectory(tmp_path / name) for name in ("whole", "divided")}
    for name, flags in (("whole", []), ("divided", ["--training.shard_optimizer=true"])):
        command = ["train.py", "--config", tiny_config_file, "--out", runs[name].path, *FLAGS, *flags]
        finish_script(*command, processes=2)
    for folder in ("checkpoints", "averages"):
        for step in (2, 4):
            file = Path(folder) / f"step_{step:07d}.pt"
            assert_same(runs["whole"].path / file, runs["divided"].path / file)
    # The averages that were drawn from are whole too.
    grids = [(runs[name].samples / "step_0000004.png").read_bytes() for name in ("whole", "divided")]
    assert grids[0] == grids[1]

    # Processes that divide go on with what undivided ones saved, and one alone with what these saved.
    halfway = {name: run.checkpoint_file(2) for name, run in runs.items()}
    finish_script("train.py", "--resume", halfway["whole"], "--training.shard_optimizer=true", processes=2)
    last = [run.checkpoint_file(4) for run in runs.values()]
    assert_same(*last)
    alone = run_script("train.py", "--resume", halfway["divided"], "--training.accumulation=2")
    assert alone.code == 0, alone.err
    averages = [flattened(read_checkpoint(file)["ema"]) for file in last]
    torch.testing.assert_close(*averages, rtol=1e-3, atol=1e-5)


def test_each_process_keeps_about_as_many_numbers():
    network = torch.nn.Sequential(*(torch.nn.Linear(width, width) for width in (7, 64, 64, 60, 5, 62, 61, 30, 31, 59)))
    parameters = dict(network.named_parameters())
    shares = [
        Division(parameters, Processes(torch.device("cpu"), rank, 3), divided=True).own(parameters) for rank in range(3)
    ]
    assert sorted(name for share in shares for name in share) == sorted(parameters)
    sizes = [sum(parameter.numel() for parameter in share.values()) for share in shares]
    assert max(sizes) < 1.5 * min(sizes)
