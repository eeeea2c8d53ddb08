"""`serve.py up`, as somebody tries it out: a worker that dies is started again, and what ends it ends all."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from improved_diffusion.errors import UserError
from improved_diffusion.serving.commands import up
from tests.serving.conftest import a_job, wait_until

PROJECT = Path(__file__).parents[2]


def test_everything_at_once(make_server, open_queue, tiny_run, tmp_path):
    queue = open_queue(make_server(tiny_run))
    job = queue.submit("A", a_job()).job
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    environment = {name: value for name, value in environment.items() if not name.startswith("TELEGRAM")}
    log = tmp_path / "log"
    with log.open("w") as file:
        command = [sys.executable, PROJECT / "serve.py", "up", "--home", queue.config.home]
        up = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:

        def started(command: str = ".*") -> list[int]:
            return [int(pid) for pid in re.findall(rf"{command}: process (\d+)", log.read_text())]

        wait_until(lambda: started("worker"))
        os.kill(started("worker")[0], signal.SIGKILL)
        wait_until(lambda: len(started("worker")) == 2)
        wait_until(lambda: queue.job(job.id).state == "done")
        address = re.search(r"status: (http\S+)", log.read_text())[1]
        assert "1 done" in urllib.request.urlopen(address).read().decode()
        up.send_signal(signal.SIGTERM)
        assert up.wait(60) == 0
        assert "is started again" in log.read_text()
        assert not any(Path(f"/proc/{pid}").exists() for pid in started())
    finally:
        up.kill()


class Played:
    """A process that has ended, or not."""

    def __init__(self, exitcode: int | None):
        self.exitcode = exitcode

    def terminate(self) -> None:
        pass

    kill = terminate

    def join(self, _: float) -> None:
        pass


@pytest.mark.parametrize(("ends", "is_a_mistake"), [([2], True), ([1, 2, 2], False)])
def test_what_could_not_start_once_may_start_later(make_server, monkeypatch, ends, is_a_mistake):
    """After a death, Telegram may be away; at the first start, what was asked for cannot be had."""
    home, stop, played = make_server().home, threading.Event(), iter([*ends, None])

    def start(command: str, _: str) -> Played:
        exitcode = next(played) if command == "bot" else None
        if command == "bot" and exitcode is None:
            stop.set()
        return Played(exitcode)

    monkeypatch.setenv("TELEGRAM_TOKEN", "1:a")
    monkeypatch.setattr(up, "_start", start)
    monkeypatch.setattr(up, "stop_signal", lambda: stop)
    monkeypatch.setattr(up, "SECONDS_BETWEEN_TRIES", 0.0)
    with pytest.raises(UserError, match="the bot could not start") if is_a_mistake else contextlib.nullcontext():
        up.run(["--home", home])
    assert stop.is_set() != is_a_mistake
