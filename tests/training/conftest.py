"""A tiny run: 16x16 images, a UNet of a few thousand parameters, no FID unless asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from improved_diffusion.config import Config, load_config
from improved_diffusion.data import open_image_set
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.settings import parse_arguments, settings_parser, to_settings
from improved_diffusion.training.devices import Processes
from improved_diffusion.training.model import build_network
from improved_diffusion.training.trainer import Trainer

PROJECT = Path(__file__).parent.parent.parent

TINY: dict[str, Any] = {
    "loss": "hybrid",
    "model": {
        "image_size": 16,
        "num_channels": 8,
        "channel_multipliers": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [8],
        "num_heads": 2,
        "dropout": 0.1,
        "class_dropout": 0.2,
    },
    "diffusion": {"timesteps": 20},
    "training": {
        "steps": 12,
        "batch_size": 4,
        "lr": 1.0e-3,
        "ema_rates": [0.9, 0.99],
        "precision": "float32",
        "log_every": 3,
        "save_every": 6,
    },
    "sampling": {"batch_size": 8},
    "evaluation": {"every": 12, "features": None, "grid_columns": 2},
}


@pytest.fixture
def tiny_config(tiny_set) -> Callable[..., Config]:
    """The tiny settings, changed by flags such as `--training.steps 4`."""

    def make(*flags: str) -> Config:
        parser = settings_parser(Config)
        return to_settings(Config, parser, parse_arguments(parser, [f"--data={tiny_set}", *flags], TINY, "TINY"))

    return make


@pytest.fixture
def tiny_config_file(tiny_set, tmp_path) -> Path:
    """The tiny settings as a YAML file."""
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({**TINY, "data": str(tiny_set)}))
    return file


@pytest.fixture
def tiny_trainer(tiny_config, tiny_set) -> Callable[..., Trainer]:
    """A new trainer in this process, with the settings changed by flags."""

    def make(*flags: str) -> Trainer:
        return Trainer(tiny_config(*flags), open_image_set(tiny_set), Processes(torch.device("cpu")))

    return make


@pytest.fixture
def start_script() -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a script of the project's root in a process of its own, or in several by torchrun."""
    started = []

    def start(*arguments: object, processes: int = 1) -> subprocess.Popen:
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--"]
        process = subprocess.Popen(
            [*command, *map(str, arguments)],
            cwd=PROJECT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def finish_script(start_script) -> Callable[..., str]:
    """Run a script as `start_script` does, to its end, which must be a success; returns what it printed."""

    def finish(*arguments: object, processes: int = 1) -> str:
        process = start_script(*arguments, processes=processes)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, f"exit status {process.returncode}\n{out}\n{err}"
        return out

    return finish


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory, tiny_set):
    """A run whose weights are not at their start, where the output is zero."""
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    settings = {
        "data": str(tiny_set),
        "model": {
            "image_size": 16,
            "num_channels": 32,
            "channel_multipliers": [1, 2],
            "num_res_blocks": 1,
            "attention_resolutions": [8],
            "class_dropout": 0.1,
        },
        "diffusion": {"timesteps": 20},
        "training": {"precision": "float32"},
    }
    run.config_file.write_text(yaml.safe_dump(settings))
    config = load_config(run.config_file)
    network = build_network(config, 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    class_names = list(open_image_set(tiny_set).class_names)
    state = {"step": 1, "model": network.state_dict(), "ema": {}, "class_names": class_names}
    run.save_checkpoint(state, keep=1)
    return run.path
