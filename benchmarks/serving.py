"""Load on a server: `python benchmarks/serving.py [--users 50] [--jobs 4]`.

All users send all their wishes to the bot at once, through the Bot API server of the tests; one worker draws them with
a small model, in few steps. Twice: undisturbed, and with the worker killed (-9) three times, the bot once, and
no memory for any batch with every tenth job in it. What must not happen is counted, as the users see it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))  # first: other packages install tests, too

from improved_diffusion.errors import UserError, user_errors_exit  # noqa: E402
from improved_diffusion.serving.commands.init import make_home  # noqa: E402
from improved_diffusion.serving.config import LimitsConfig, ModelsConfig, ServingConfig  # noqa: E402
from improved_diffusion.serving.ledger import Ledger  # noqa: E402
from improved_diffusion.serving.queue import JobQueue  # noqa: E402
from improved_diffusion.serving.requests import ClassRequest  # noqa: E402
from tests.serving.fake_telegram import TOKEN, FakeTelegram  # noqa: E402

FIRST_USER, BOT = 100, "bot"
SMALL = str(PROJECT / "pretrained" / "synthetic-64")


@dataclass(frozen=True)
class Disturbance:
    """What works, and what goes wrong on purpose."""

    workers: int = 1
    worker_kills: int = 0
    bot_kills: int = 0
    no_memory: int = 0  # for batches with a job in them whose seed this divides; 0 for none
    steps: int = 4  # of sampling, whatever was asked for: what is measured is not the model


@dataclass(frozen=True)
class Outcome:
    """What came of a burst."""

    jobs: int
    lost: int  # neither drawn nor explained
    twice: int  # results that a user got more than once
    unsure: int  # results of which nobody knows whether they arrived, and which /result sends
    fairness: float  # the longest mean wait of a user to the shortest
    seconds: float

    def row(self, name: str) -> str:
        numbers = f"{self.jobs:>6}{self.lost:>6}{self.twice:>7}{self.unsure:>8}{self.fairness:>10.2f}"
        return f"{name:<14}{numbers}{self.seconds:>9.1f}{self.jobs / self.seconds:>9.2f}"


HEADER = f"{'':<14}{'jobs':>6}{'lost':>6}{'twice':>7}{'unsure':>8}{'fairness':>10}{'seconds':>9}{'jobs/s':>9}"


def work(config: ServingConfig, disturbance: Disturbance, name: str) -> None:
    """A worker, in a process of its own, until it is killed."""
    import torch
    from tqdm import tqdm

    from improved_diffusion.serving.drawers import open_drawers
    from improved_diffusion.serving.worker import Worker

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared with forks, and locked for good if one is killed
    drawers, offer = open_drawers(config)
    draw = drawers["class"].draw

    def draw_if_there_is_room(requests, on_progress):
        every = disturbance.no_memory
        if every and len(requests) > 1 and any(request.seed % every == 0 for request in requests):
            raise RuntimeError("out of memory, as the benchmark wants it")
        return draw([dataclasses.replace(request, steps=disturbance.steps) for request in requests], on_progress)

    drawers["class"].draw = draw_if_there_is_room
    Worker(config, drawers, offer, name).start()
    threading.Event().wait()


def talk(config: ServingConfig, server: str) -> None:
    """The bot, in a process of its own, until it is killed."""
    import asyncio

    from improved_diffusion.serving.commands.bot import serve_bot

    with contextlib.redirect_stdout(io.StringIO()):
        asyncio.run(serve_bot(JobQueue(config), TOKEN, server))


def server(home: Path, users: int, jobs: int, pixel: str = SMALL, database: str | None = None) -> ServingConfig:
    """The settings of one that takes all these jobs."""
    models = ModelsConfig(pixel=pixel, base=None, device="cpu", batch_size=8)
    limits = LimitsConfig(queued=users * jobs, queued_per_user=jobs)
    return ServingConfig(home=str(home), database=database, models=models, limits=limits)


def burst(context: BaseContext, config: ServingConfig, users: int, jobs: int, disturbance: Disturbance) -> Outcome:
    """Let `users` ask for `jobs` pictures each at once, and wait for the end; then nothing is left of them."""
    make_home(config)
    telegram, processes = FakeTelegram(), {}

    def start(name: str) -> None:
        target, arguments = (talk, (config, telegram.address)) if name == BOT else (work, (config, disturbance, name))
        processes[name] = context.Process(target=target, args=arguments, daemon=True)
        processes[name].start()

    workers = [f"worker{number}" for number in range(disturbance.workers)]
    for name in workers:
        start(name)
    queue = JobQueue(config)
    ledger = Ledger(queue.engine)
    people = range(FIRST_USER, FIRST_USER + users)
    try:
        _wait(lambda: _has_started(queue))
        class_name = queue.offer()["classes"][0]
        _learn_how_long_it_takes(queue, class_name)
        began = time.time()
        for _ in range(jobs):
            for user in people:
                telegram.say(f"/class {class_name}", user)
        start(BOT)
        total = users * jobs
        kills = _evenly([workers[i % len(workers)] for i in range(disturbance.worker_kills)])
        for done, name in sorted(kills + _evenly([BOT] * disturbance.bot_kills)):
            _wait(lambda: len(queue.jobs_in(["done"], "telegram:")) >= done * total)  # noqa: B023
            end(processes[name])
            start(name)
        _wait(lambda: len(queue.jobs_in(["done", "failed", "parked"], "telegram:")) == total)
        _wait(lambda: not ledger.undelivered("telegram:"))
        time.sleep(1)  # for what would come twice
    finally:
        for process in processes.values():
            end(process)
        telegram.close()
    ended = queue.jobs_in(["done"], "telegram:")
    got = {user: telegram.pictures(user) for user in people}
    unsure = sum(len(ledger.unsure(f"telegram:{user}")) for user in people)
    waits = [
        statistics.mean(job.finished - job.created for job in ended if job.user == f"telegram:{user}")
        for user in people
    ]
    outcome = Outcome(
        jobs=total,
        lost=total - len(ended) + max(0, len(ended) - unsure - sum(len(set(files)) for files in got.values())),
        twice=sum(len(files) - len(set(files)) for files in got.values()),
        unsure=unsure,
        fairness=max(waits) / min(waits),
        seconds=max(job.finished for job in ended) - began,
    )
    for user in people:
        queue.purge(f"telegram:{user}")
    queue.close()
    return outcome


def _evenly(names: list[str]) -> list[tuple[float, str]]:
    """(part of the burst after which it is killed, name)."""
    return [((i + 1) / (len(names) + 1), name) for i, name in enumerate(names)]


def end(process: BaseProcess) -> None:
    process.kill()
    process.join()


def _has_started(queue: JobQueue) -> bool:
    """Whether a worker has said what it draws."""
    with contextlib.suppress(UserError):
        return bool(queue.offer())
    return False


def _learn_how_long_it_takes(queue: JobQueue, class_name: str) -> None:
    """Let a picture be drawn before the burst, as on any server that is not new: places in the queue are counted in
    seconds of the device, which a worker that has never drawn can only guess."""
    job = queue.submit("early", ClassRequest(class_name=class_name)).job
    _wait(lambda: queue.job(job.id).state == "done")
    queue.purge(job.user)


def _wait(is_so: Callable[[], bool]) -> None:
    while not is_so():
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=4, help="of each user, of one picture each")
    parser.add_argument("--workers", type=int, default=1, help="several need a database for several machines")
    parser.add_argument("--database", help="postgresql+psycopg://USER@HOST/NAME, an empty one (default: SQLite)")
    options = parser.parse_args()
    context, number = multiprocessing.get_context("spawn"), options.workers
    print(HEADER)
    for name, disturbance in {"undisturbed": Disturbance(number), "with kills": Disturbance(number, 3, 1, 10)}.items():
        with tempfile.TemporaryDirectory() as folder:
            config = server(Path(folder) / "home", options.users, options.jobs, database=options.database)
            outcome = burst(context, config, options.users, options.jobs, disturbance)
        print(outcome.row(name), flush=True)


if __name__ == "__main__":
    with user_errors_exit():
        main()
