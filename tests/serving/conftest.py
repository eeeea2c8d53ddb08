from __future__ import annotations

import copy
import functools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from improved_diffusion.serving.commands.init import make_home
from improved_diffusion.serving.config import LimitsConfig, ModelsConfig, ServingConfig
from improved_diffusion.serving.queue import JobQueue
from improved_diffusion.serving.records import Records
from improved_diffusion.serving.requests import ClassRequest
from improved_diffusion.serving.worker import Worker
from tests.conftest import Started, free_port
from tests.personalize.conftest import scripts  # noqa: F401

SMALL = Path(__file__).parents[2] / "pretrained" / "synthetic-64"
CLASSES = ["apple_pie", "creme_brulee", "waffles"]
OFFER = {"kinds": ["class", "process", "text", "image"], "classes": CLASSES, "can_be_guided": True, "styles": ["dog"]}


def a_job(seed: int = 0, **values: object) -> ClassRequest:
    return ClassRequest(**{"class_name": "waffles", "seed": seed, "steps": 2, **values})


def wait_until(is_so: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def make_server(tmp_path) -> Callable[..., ServingConfig]:
    """Makes the home of a server whose pixel model is at `pixel`, with limits of one's own."""

    def make(pixel: Path | str | None = SMALL, models: dict | None = None, **limits: object) -> ServingConfig:
        settings = {"device": "cpu", "pixel": None if pixel is None else str(pixel), "base": None, "matting": None}
        chosen = ModelsConfig(**settings | (models or {}))
        ports = {"port": 0, "page_port": free_port()}
        config = ServingConfig(home=str(tmp_path / "home"), **ports, models=chosen, limits=LimitsConfig(**limits))
        make_home(config)
        return config

    return make


@pytest.fixture(scope="session")
def fresh_base(tmp_path_factory, scripts):  # noqa: F811
    """A random Stable Diffusion of which nothing is anyone else's but the tokenizer: to read it takes longer than all
    else."""
    from tiny_pipeline import make_pipeline

    from improved_diffusion.personalize.models.base import Base, load_base

    folder = tmp_path_factory.mktemp("base")
    make_pipeline("sd").save_pretrained(folder)
    loaded = load_base(str(folder))
    shared = {id(tokenizer): tokenizer for tokenizer in loaded.tokenizers}
    return lambda: Base(loaded.name, copy.deepcopy(loaded.pipeline, dict(shared)))


@pytest.fixture
def start_server(start_script) -> Callable[..., Started]:
    """Start a command of serve.py in a process of its own. Not in a fork: SQLite's state, of which this process has
    some while it looks at the queue, must not be taken into one."""
    return functools.partial(start_script, "serve.py", by="spawn")


@pytest.fixture
def open_queue() -> Iterator[Callable[[ServingConfig], JobQueue]]:
    opened = []

    def opening(config: ServingConfig) -> JobQueue:
        opened.append(JobQueue(config))
        Records(config, opened[-1].engine).publish(OFFER)
        return opened[-1]

    yield opening
    for queue in opened:
        queue.close()


@pytest.fixture
def start_worker() -> Iterator[Callable[..., Worker]]:
    """Starts a worker in this process, one at a time."""
    started: list[Worker] = []

    def start(config: ServingConfig, drawers: dict, offer: dict = OFFER, name: str = "worker") -> Worker:
        started.append(Worker(config, drawers, offer, name))
        started[-1].start()
        return started[-1]

    yield start
    for worker in started:
        if not worker.has_ended:
            worker.stop()
    logging.getLogger("dbos").handlers.clear()  # of DBOS, with a stream that may be closed with this test
