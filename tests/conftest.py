"""What several floors' tests need: tiny image sets, command lines run in this process or in others, and a tiny run."""

from __future__ import annotations

import faulthandler
import gc
import io
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tqdm import tqdm

from improved_diffusion.config import Config, ModelConfig
from improved_diffusion.config_file import load_config
from improved_diffusion.data import open_image_set
from improved_diffusion.models.backbone import Backbone
from improved_diffusion.models.build import build_network
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.runtime.devices import Processes
from improved_diffusion.settings import parse_arguments, settings_parser, to_settings
from improved_diffusion.training import loop
from improved_diffusion.training.curves import draw_curves
from improved_diffusion.training.evaluation import Evaluator
from improved_diffusion.training.loop import TrainingLoop
from improved_diffusion.training.trainer import Trainer

PROJECT = Path(__file__).parent.parent
torch.set_num_threads(1)
os.environ["NUMBA_NUM_THREADS"] = "1"  # pymatting's: processes that are forked beside its OpenMP threads would hang


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="show the GPU to the tests: for tests/training/test_gpu.py")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is tested is the arithmetic of the CPU, bit for bit
        # The first backward pass decides whether PyTorch has threads for GPUs, with which no fork could run another.
        # After torch.compile it would, as that plays a GPU where there is none.
        torch.ones(1, requires_grad=True).backward()
    gc.disable()  # until all is imported, of which nothing is garbage


def pytest_collection_finish() -> None:
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # see `small_collections`; libraries look at the end whether something was leaked


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> Iterator[None]:
    """A cache directory of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def small_collections() -> None:
    """What is there before a module's tests is not looked through again whenever garbage is collected: the modules that
    are imported make millions of objects, and it would take a fifth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_curves() -> Iterator[None]:
    """Runs leave out curves.png, which takes longer to draw than a tiny network to train: see `curves`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_curves", lambda run: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def counted_once() -> Iterator[None]:
    """The arithmetic of a network is counted once, and not again in every run of one like it."""
    count, known = loop.flops_per_image, {}

    def remembered(network: Backbone, model: ModelConfig) -> int:
        key = model, tuple(parameter.shape for parameter in network.parameters())
        if key not in known:
            known[key] = count(network, model)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "flops_per_image", remembered)
        yield


@pytest.fixture
def curves(monkeypatch) -> None:
    """Runs draw curves.png."""
    monkeypatch.setattr(loop, "draw_curves", draw_curves)


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
    "sampling": {"batch_size": 8, "steps": 2},
    "evaluation": {"every": 12, "features": None, "grid_columns": 2},
}


@pytest.fixture
def tiny_config(tiny_set) -> Callable[..., Config]:
    """The tiny settings, changed by flags such as `--training.steps 4`."""

    def make(*flags: str) -> Config:
        parser = settings_parser(Config)
        return to_settings(Config, parser, parse_arguments(parser, [f"--data={tiny_set}", *flags], TINY, "TINY"))

    return make


@pytest.fixture(scope="session")
def tiny_config_file(tiny_set, tmp_path_factory) -> Path:
    """The tiny settings as a YAML file, to be read only."""
    file = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    file.write_text(yaml.safe_dump({**TINY, "data": str(tiny_set)}))
    return file


@pytest.fixture(scope="session")
def train_tiny(tiny_config_file, tmp_path_factory) -> Callable[..., Path]:
    """A new run by `train.py`, in this process, of the tiny settings changed by flags: for several tests to look at."""

    def train(*flags: str) -> Path:
        out = tmp_path_factory.mktemp("trained") / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", f"--config={tiny_config_file}", f"--out={out}", *flags])
            with pytest.raises(SystemExit, match="^0$"):
                runpy.run_path(str(PROJECT / "train.py"), run_name="__main__")
        return out

    return train


@pytest.fixture
def tiny_trainer(tiny_config, tiny_set) -> Callable[..., Trainer]:
    """A new trainer in this process, with the settings changed by flags."""

    def make(*flags: str) -> Trainer:
        return Trainer(tiny_config(*flags), open_image_set(tiny_set), Processes(torch.device("cpu")))

    return make


@dataclass(frozen=True)
class Started:
    """A command at work in processes of its own."""

    processes: list[BaseProcess]
    out: Path
    err: Path

    def finish(self) -> Outcome:
        """Wait for the end of all its processes, or of one that fails."""
        deadline = time.monotonic() + 240
        while any(process.is_alive() for process in self.processes) and not self.code:
            assert time.monotonic() < deadline, self.where_it_hangs()
            time.sleep(0.01)
        return Outcome(self.code, self.out.read_text(), self.err.read_text())

    @property
    def code(self) -> int:
        """The exit status, which is that of a process that failed if one did; 0 before the end."""
        return next((process.exitcode for process in self.processes if process.exitcode), 0)

    def wait_for(self, is_ready: Callable[[], bool]) -> None:
        """Return when it is so, which must be before the end."""
        deadline = time.monotonic() + 120
        while not is_ready():
            assert all(process.is_alive() for process in self.processes), self.err.read_text()
            assert time.monotonic() < deadline, self.where_it_hangs()
            time.sleep(0.01)

    def where_it_hangs(self) -> str:
        """What it printed, and where its threads are; ends it."""
        for process in self.processes:
            os.kill(process.pid, signal.SIGABRT)
            process.join()
        return self.err.read_text()

    def send(self, number: signal.Signals) -> Outcome:
        for process in self.processes:
            os.kill(process.pid, number)
        return self.finish()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def as_a_program(arguments: list[str], environment: dict[str, str], files: list[Path]) -> None:
    """Run a script as `python SCRIPT ARGUMENTS` would, in a new process; `files` are its output and errors."""
    os.environ.update(environment)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w"), line_buffering=True) for number in (1, 2))
    faulthandler.enable()
    sys.argv = arguments
    tqdm.set_lock(threading.RLock())  # its own is shared with the forks, and locked for good if one is killed
    runpy.run_path(str(PROJECT / arguments[0]), run_name="__main__")


@pytest.fixture
def start_script(tmp_path) -> Iterator[Callable[..., Started]]:
    """Start a script of the project's root in a process of its own, or in several as torchrun does. They are forks of
    this one, so that none takes seconds to import torch, unless `by` is "spawn"."""
    started: list[BaseProcess] = []

    def start(
        *arguments: object, processes: int = 1, environment: dict[str, str] | None = None, by: str = "fork"
    ) -> Started:
        place = Path(tempfile.mkdtemp(dir=tmp_path))
        files = [place / "out", place / "err"]
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        own = []
        for rank in range(processes):
            ranks = {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            given = ([*map(str, arguments)], {**ranks, **(environment or {})}, files)
            own.append(multiprocessing.get_context(by).Process(target=as_a_program, args=given))
            own[-1].start()
        started.extend(own)
        return Started(own, *files)

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def finish_script(start_script) -> Callable[..., str]:
    """Run a script as `start_script` does, to its end, which must be a success; returns what it printed."""

    def finish(*arguments: object, **how: Any) -> str:
        outcome = start_script(*arguments, **how).finish()
        assert outcome.code == 0, f"exit status {outcome.code}\n{outcome.out}\n{outcome.err}"
        return outcome.out

    return finish


@pytest.fixture(scope="session")
def short_settings(tiny_set) -> dict[str, Any]:
    """Of a run of two steps, with a checkpoint of each, whose sampler of timesteps keeps a state."""
    model = {name: value for name, value in TINY["model"].items() if "dropout" not in name}
    training = {"steps": 2, "batch_size": 4, "save_every": 1, "precision": "float32"}
    return {
        **{"data": str(tiny_set), "loss": "vlb", "model": model, "diffusion": {"timesteps": 10}, "training": training},
        **{"sampling": {"steps": 2}, "evaluation": {"every": 2, "features": None, "grid_columns": 1}},
    }


@pytest.fixture(scope="session")
def finished_run(short_settings, tmp_path_factory) -> Path:
    """A run that has come to its end."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "settings.yaml").write_text(yaml.safe_dump(short_settings))
    config, processes = load_config(folder / "settings.yaml"), Processes(torch.device("cpu"))
    run, image_set = RunDirectory(folder / "run"), open_image_set(config.data)
    run.write_config(config, [{"processes": 1}])
    trainer, evaluator = Trainer(config, image_set, processes), Evaluator(config, image_set, processes)
    TrainingLoop(trainer, evaluator, run, image_set).train()
    return run.path


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
