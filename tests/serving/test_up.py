"""`serve.py up`, as somebody tries it out: a worker that dies is started again, and what ends it ends all."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

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
