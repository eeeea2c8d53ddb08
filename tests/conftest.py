"""What several floors' tests need: tiny image sets, command lines run in this process or in others, and a tiny run."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from improved_diffusion.config import Config, load_config
from improved_diffusion.data import open_image_set
from improved_diffusion.models.build import build_network
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.runtime.devices import Processes
from improved_diffusion.settings import parse_arguments, settings_parser, to_settings
from improved_diffusion.training.trainer import Trainer

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is tested is the arithmetic of the CPU, bit for bit
PROJECT = Path(__file__).parent.parent
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> Iterator[None]:
    """A cache directory of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@dataclass(frozen=True)
class Outcome:
    """What a command line did."""

    code: int
    out: str
    err: str

    def is_one_clear_line(self) -> bool:
        """Whether it exited as a user's mistake should: status 2, one line that starts with `error:`, no traceback."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return self.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")


@pytest.fixture
def run_script(monkeypatch, capfd) -> Callable[..., Outcome]:
    """Run a script of the project's root, in this process, as `python SCRIPT ARGUMENTS` would."""

    def run(script: str, *arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(str(PROJECT / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory) -> Path:
    """A packed set of 36 images, 16x16, of 3 classes, with a test split inside it: blobs of a class's colour."""
    from improved_diffusion.data.labelled_files import labelled_folder
    from improved_diffusion.data.packing import pack

    root = tmp_path_factory.mktemp("tiny")
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(("apple_pie", "creme_brulee", "waffles")):
            folder = root / "files" / split / name
            folder.mkdir(parents=True)
            for number in range(12):
                image = generator.integers(0, 80, (16, 16, 3), dtype=np.uint8)
                top, left = generator.integers(0, 8, 2)
                image[top : top + 8, left : left + 8, label] = 220
                Image.fromarray(image).save(folder / f"{number}.png")
    pack(labelled_folder(root / "files"), root / "set", 16, workers=1)
    return root / "set"


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
