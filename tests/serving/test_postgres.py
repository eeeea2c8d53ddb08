"""The queue on PostgreSQL, a real one for the time of the tests; where it is not installed, this is skipped."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from improved_diffusion.errors import UserError
from improved_diffusion.serving.commands.init import make_home
from improved_diffusion.serving.config import ServingConfig
from improved_diffusion.serving.queue import JobQueue
from improved_diffusion.serving.summary import summarize
from improved_diffusion.serving.upkeep import remove_expired
from improved_diffusion.serving.uploads import keep_upload
from tests.serving.conftest import a_job, free_port, wait_until
from tests.serving.test_uploads import JPEG
from tests.serving.test_worker import FakeDrawer

DEBIAN = Path("/usr/lib/postgresql")


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Iterator[str]:
    """Address of an empty database."""
    tools = next(iter(sorted(DEBIAN.glob("*/bin"), reverse=True)), None)
    programs = Path(found).resolve().parent if (found := shutil.which("pg_ctl")) else tools
    if programs is None:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    folder, port = tmp_path_factory.mktemp("postgres") / "data", free_port()
    folder.mkdir()
    own = []
    if os.geteuid() == 0:  # PostgreSQL refuses to be root
        own = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
        for parent in folder.parents:  # pytest's own, which nobody else may enter
            if parent == Path(tempfile.gettempdir()):
                break
            parent.chmod(0o755)

    def run(program: str, *arguments: object) -> None:
        command = [*own, str(programs / program), *map(str, arguments)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")

    run("initdb", "-D", folder, "-U", "server", "--auth=trust", "--no-sync")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    run("pg_ctl", "-D", folder, "-w", "-l", folder / "log", "-o", options, "start")
    try:
        run("createdb", "-h", "127.0.0.1", "-p", port, "-U", "server", "queue")
        yield f"postgresql+psycopg://server@127.0.0.1:{port}/queue"
    finally:
        run("pg_ctl", "-D", folder, "-m", "immediate", "stop")


@pytest.fixture
def config(make_server, database) -> ServingConfig:
    on_postgres = dataclasses.replace(make_server(), database=database)
    make_home(on_postgres)
    return on_postgres


def test_a_queue_from_the_first_job_to_the_last_row(config, open_queue, start_worker):
    """Fair, cancelled, drawn together, expired, removed: what the other tests show of SQLite."""
    queue, drawer = open_queue(config), FakeDrawer(0.02)
    jobs = [queue.submit("A", a_job(seed, guidance_scale=1 + seed)).job for seed in range(3)]
    jobs += [queue.submit("B", a_job(seed, guidance_scale=1 + seed)).job for seed in (5, 6)]
    assert queue.submit("B", jobs[4].request, jobs[4].id).job == jobs[4], "the same id is the same job"
    assert [queue.ticket(job.id).place for job in jobs] == [1, 3, 5, 2, 4]
    assert queue.cancel(jobs[2].id, "A")
    upload = keep_upload(queue, "A", JPEG)
    start_worker(config, {"class": drawer})
    wait_until(lambda: not queue.jobs_in(["queued", "running"]))
    assert [queue.job(job.id).state for job in jobs] == ["done", "done", "cancelled", "done", "done"]
    assert drawer.drawn == [[0], [5], [1], [6]]
    assert summarize(queue).states["done"] == 4
    short = dataclasses.replace(config.limits, results_hours=1e-9, uploads_hours=1e-9)
    queue.config = dataclasses.replace(config, limits=short)
    assert remove_expired(queue) == 6
    assert not (config.uploads / upload).exists()
    queue.choose_style("A", "dog")
    assert (queue.purge("A"), queue.style_of("A"), queue.jobs_of("B")) == (0, None, [])


def test_a_database_that_is_away_is_one_clear_line(config):
    away = dataclasses.replace(config, database=f"postgresql+psycopg://server@127.0.0.1:{free_port()}/queue")
    with pytest.raises(UserError, match="cannot be used"):
        make_home(away)
    with pytest.raises(UserError, match="cannot be used"):
        JobQueue(away)
