"""A worker draws what is queued: for real where a model is asked, and with drawers that fail where failing matters."""

from __future__ import annotations

import signal
import time
import urllib.request
from collections.abc import Sequence

import numpy as np
import sqlalchemy as sa
from dbos import _queue
from PIL import Image

from improved_diffusion.errors import UserError
from improved_diffusion.sampling import export
from improved_diffusion.sampling.loading import load
from improved_diffusion.serving.database import workers
from improved_diffusion.serving.device import OnProgress, Stopped
from improved_diffusion.serving.drawers import open_drawers
from improved_diffusion.serving.records import Records
from improved_diffusion.serving.requests import Request, TextRequest
from improved_diffusion.serving.status_page import StatusServer
from tests.serving.conftest import CLASSES, a_job, wait_until

FINISHED = ("done", "failed", "parked", "cancelled")


class FakeDrawer:
    """Draws its requests' seeds as grey levels, slowly; refuses some, and has memory for a few pictures only."""

    def __init__(self, seconds: float = 0.01, room: int = 100):
        self.seconds = seconds
        self.room = room
        self.drawn: list[list[int]] = []
        self.released = 0

    def draw(self, requests: Sequence[Request], on_progress: OnProgress) -> list[list[Image.Image]]:
        self.drawn.append([request.seed for request in requests])
        for request in requests:
            if request.seed == 13:
                raise UserError("thirteen is not drawn")
            if request.seed == 14:
                raise ZeroDivisionError("a mistake of ours")
        if sum(request.n for request in requests) > self.room:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        for step in range(20):
            time.sleep(self.seconds)
            on_progress(step / 20)
        return [[Image.new("L", (4, 4), request.seed)] * request.n for request in requests]

    def release(self) -> None:
        self.released += 1


def all_ended(queue):
    return not queue.jobs_in(["queued", "running"])


def test_classes_are_drawn_as_sample_draws_them(make_server, open_queue, start_worker, tiny_run, tmp_path):
    """In batches of several users' jobs, each with its own seed; guided as the model's settings say, or as asked."""
    guided = tmp_path / "guided.safetensors"
    export.main([str(tiny_run), "--guidance-scale", "1.5", "--out", str(guided)])
    config = make_server(guided, {"batch_size": 4})
    queue = open_queue(config)
    drawers, offer = open_drawers(config)
    told = {"classes": CLASSES, "can_be_guided": True, "guidance_scale": 1.5, "styles": []}
    assert offer == {"kinds": ["class", "process"], **told}
    asked = [a_job(seed, n=n, class_name=name, steps=5) for seed, n, name in ((1, 1, CLASSES[0]), (2, 2, CLASSES[2]))]
    asked.append(a_job(1, class_name=CLASSES[1], steps=5, guidance_scale=2.0))
    jobs = [queue.submit(f"user {number}", request).job for number, request in enumerate(asked)]
    start_worker(config, drawers, offer)
    wait_until(lambda: all_ended(queue))
    model = load(guided, device="cpu")
    for job, request in zip(jobs, asked, strict=True):
        job = queue.job(job.id)
        assert (job.state, job.attempts, job.progress) == ("done", 1, 1.0)
        how = {"steps": 5, "sampler": "dpmpp_2m", "guidance_scale": request.guidance_scale, "show_progress": False}
        alone = model.sample(request.class_name, request.n, seed=request.seed, **how).astype(int)
        drawn = np.stack([np.asarray(Image.open(file)) for file in queue.files(job)])
        assert np.abs(alone - drawn).max() <= 1
    assert queue.ticket(jobs[0].id).seconds == 0


def test_jobs_of_equal_settings_are_drawn_together(make_server, open_queue, start_worker):
    config = make_server(models={"batch_size": 4})
    queue, drawer = open_queue(config), FakeDrawer(0.05)
    for seed in range(6):
        queue.submit(f"user {seed}", a_job(seed, steps=3 if seed == 2 else 2, n=4 if seed == 0 else 1))
    start_worker(config, {"class": drawer})
    wait_until(lambda: all_ended(queue))
    assert drawer.drawn == [[0], [1, 3, 4, 5], [2]]


def test_one_jobs_failure_is_not_anothers(make_server, open_queue, start_worker, capfd):
    config = make_server(models={"batch_size": 8})
    queue, drawer = open_queue(config), FakeDrawer(0)
    jobs = {seed: queue.submit(f"user {seed}", a_job(seed)).job for seed in (11, 12, 13, 14, 15)}
    start_worker(config, {"class": drawer})
    wait_until(lambda: all_ended(queue))
    ends = {seed: queue.job(job.id) for seed, job in jobs.items()}
    assert {seed: job.state for seed, job in ends.items()} == dict.fromkeys((11, 12, 15), "done") | {
        13: "failed",
        14: "failed",
    }
    assert ends[13].error == "thirteen is not drawn"
    assert "the operator's log" in ends[14].error
    assert "a mistake of ours" in capfd.readouterr().err


def test_what_is_no_longer_offered_fails_with_an_answer(make_server, open_queue, start_worker):
    config = make_server()
    queue = open_queue(config)
    job = queue.submit("A", TextRequest(prompt="a dog", style="dog")).job
    start_worker(config, {"class": FakeDrawer(0)})
    wait_until(lambda: all_ended(queue))
    assert queue.job(job.id).error == "this server draws no text jobs any more"


def test_too_little_memory_halves_the_batch(make_server, open_queue, start_worker):
    config = make_server(models={"batch_size": 8})
    queue, drawer = open_queue(config), FakeDrawer(0, room=2)
    small = [queue.submit(f"user {seed}", a_job(seed)).job for seed in range(4)]
    large = queue.submit("greedy", a_job(9, n=3)).job
    start_worker(config, {"class": drawer})
    wait_until(lambda: all_ended(queue))
    assert [queue.job(job.id).state for job in small] == ["done"] * 4
    assert queue.job(large.id).state == "failed"
    assert "too little memory" in queue.job(large.id).error
    assert drawer.drawn.count([9]) == 2, "it is tried once more when memory was released"
    assert drawer.released >= 3


def test_a_running_job_can_be_cancelled(make_server, open_queue, start_worker):
    config = make_server()
    queue = open_queue(config)
    jobs = [queue.submit("A", a_job(seed)).job for seed in range(2)]
    start_worker(config, {"class": FakeDrawer(0.1)})
    wait_until(lambda: all(queue.job(job.id).progress > 0 for job in jobs))
    assert queue.cancel(jobs[0].id, "A")
    wait_until(lambda: queue.job(jobs[1].id).state == "done")
    assert (queue.job(jobs[0].id).state, queue.files(queue.job(jobs[0].id))) == ("cancelled", [])
    alone = queue.submit("A", a_job(5)).job
    wait_until(lambda: queue.job(alone.id).progress > 0)
    queue.cancel(alone.id, "A")
    after = queue.submit("A", a_job(6, steps=1)).job
    began = time.monotonic()
    wait_until(lambda: queue.job(after.id).state == "running")
    assert time.monotonic() - began < 3, "it stops at its next step, not at its end"
    removed = queue.submit("B", a_job(7)).job
    wait_until(lambda: queue.ticket(removed.id).job.progress > 0)
    queue.purge("B")
    last = queue.submit("A", a_job(8, steps=1)).job
    wait_until(lambda: queue.job(last.id).state == "done")
    assert not (config.results / removed.id).exists()
    assert not (config.results / jobs[0].id).exists()
    assert not (config.results / alone.id).exists()


def test_a_worker_that_is_stopped_leaves_its_jobs_queued(make_server, open_queue, start_worker):
    config = make_server(models={"batch_size": 1})
    queue = open_queue(config)
    jobs = [queue.submit("A", a_job(seed)).job for seed in range(2)]
    worker = start_worker(config, {"class": FakeDrawer(1)})
    wait_until(lambda: queue.job(jobs[0].id).state == "running")
    worker.stop()
    assert [(one.state, one.attempts) for one in queue.jobs_of("A")] == [("queued", 0)] * 2
    start_worker(config, {"class": FakeDrawer(0)})
    wait_until(lambda: all_ended(queue))
    assert [(one.state, one.attempts) for one in queue.jobs_of("A")] == [("done", 1)] * 2


def test_jobs_of_a_worker_that_was_stopped_are_drawn_by_another(make_server, open_queue, start_worker, monkeypatch):
    """For it may never be started again."""
    monkeypatch.setattr("improved_diffusion.serving.worker.SECONDS_BETWEEN_SIGNS", 0.1)
    config = make_server(models={"batch_size": 1})
    queue = open_queue(config)
    jobs = [queue.submit("A", a_job(seed)).job for seed in range(3)]
    stopped = start_worker(config, {"class": FakeDrawer(1)}, name="one")
    wait_until(lambda: queue.jobs_in(["running"]))
    stopped.stop()
    start_worker(config, {"class": FakeDrawer(0)}, name="another")
    wait_until(lambda: all_ended(queue))
    assert [(queue.job(job.id).state, queue.job(job.id).attempts) for job in jobs] == [("done", 1)] * 3


def test_a_part_that_is_cancelled_takes_no_other_with_it(make_server, open_queue, start_worker):
    """Of a batch that was divided for want of memory."""
    config = make_server(models={"batch_size": 2})
    queue = open_queue(config)
    cancelled, wanted = (queue.submit(user, a_job(seed)).job for seed, user in enumerate("AB"))
    start_worker(config, {"class": FakeDrawer(0.1, room=1)})
    wait_until(lambda: queue.job(cancelled.id).progress > 0)
    queue.cancel(cancelled.id, "A")
    wait_until(lambda: all_ended(queue))
    assert queue.job(cancelled.id).state == "cancelled"
    assert queue.job(wanted.id).state == "done"


def test_a_lost_device_is_no_jobs_fault(make_server, open_queue, start_worker, monkeypatch):
    """The process ends, and nothing is told to have failed: a new one can use the device again."""

    class Broken(FakeDrawer):
        def draw(self, requests, on_progress):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    ends = []

    def die():
        ends.append(time.time())
        raise Stopped

    monkeypatch.setattr("improved_diffusion.serving.device.die", die)
    config = make_server(models={"batch_size": 1})
    queue = open_queue(config)
    jobs = [queue.submit(user, a_job()).job for user in "AB"]
    worker = start_worker(config, {"class": Broken()})
    wait_until(lambda: len(ends) == 2)
    worker.stop()
    assert {queue.job(job.id).state for job in jobs} == {"queued"}


def test_a_database_that_does_not_answer_is_asked_again(make_server, open_queue, start_worker, monkeypatch):
    monkeypatch.setattr("improved_diffusion.serving.worker.SECONDS_BETWEEN_SIGNS", 0.1)
    begin, failed = Records.begin, []

    def begin_late(records, job_ids):
        if not failed:
            failed.append(job_ids)
            raise sa.exc.TimeoutError("QueuePool limit reached")
        return begin(records, job_ids)

    monkeypatch.setattr(Records, "begin", begin_late)
    config = make_server()
    queue = open_queue(config)
    job = queue.submit("A", a_job()).job
    start_worker(config, {"class": FakeDrawer(0)})
    wait_until(lambda: all_ended(queue))
    assert failed
    assert queue.job(job.id).state == "done"


def test_what_could_not_be_started_is_started_again(make_server, open_queue, start_worker, monkeypatch):
    """As when the database is away at the moment between claim and start."""
    monkeypatch.setattr("improved_diffusion.serving.worker.SECONDS_BETWEEN_SIGNS", 0.1)
    start, failed = _queue.execute_dequeued_workflow, []

    def start_or_fail(dbos, status, *others):
        if len(failed) < 2:
            failed.append(status["workflow_uuid"])
            raise sa.exc.OperationalError("SELECT", {}, Exception("database is locked"))
        return start(dbos, status, *others)

    monkeypatch.setattr(_queue, "execute_dequeued_workflow", start_or_fail)
    config = make_server()
    queue = open_queue(config)
    jobs = [queue.submit("A", a_job(seed)).job for seed in range(3)]
    start_worker(config, {"class": FakeDrawer(0)})
    wait_until(lambda: all_ended(queue))
    assert len(failed) == 2
    assert [(queue.job(job.id).state, queue.job(job.id).attempts) for job in jobs] == [("done", 1)] * 3


def test_status_is_shown_and_measured(make_server, open_queue, start_worker, run_script):
    config = make_server()
    queue = open_queue(config)
    for seed in range(3):
        queue.submit(f"<b>{seed}", a_job(seed, n=2))
    start_worker(config, {"class": FakeDrawer(0)})
    wait_until(lambda: all_ended(queue))
    printed = run_script("serve.py", "status", "--home", config.home).out
    assert "3 done" in printed
    assert "worker: draws class" in printed
    server = StatusServer(queue, "127.0.0.1", 0)
    page = urllib.request.urlopen(server.address).read().decode()
    metrics = urllib.request.urlopen(f"{server.address}/metrics").read().decode()
    server.close()
    assert "3 done" in page
    assert "<b>" not in page
    assert 'serving_jobs{state="done"} 3.0' in metrics
    assert "process_resident_memory_bytes" in metrics
    assert "serving_workers 1.0" in metrics


def test_kill_the_worker_and_nothing_is_lost(make_server, open_queue, start_server, tiny_run):
    """Nor drawn twice that was done; a second worker of the same name is refused."""
    config = make_server(tiny_run, {"batch_size": 2})
    queue = open_queue(config)
    jobs = [queue.submit(f"user {seed % 3}", a_job(seed, n=2, steps=12)).job for seed in range(6)]
    done: dict[str, float] = {}
    for _ in range(2):
        worker = start_server("worker", "--home", config.home)
        before = len(done)
        worker.wait_for(lambda: len(queue.jobs_in(["done"])) > before and queue.jobs_in(["running"]))  # noqa: B023
        worker.send(signal.SIGKILL)
        done = {job.id: job.finished for job in queue.jobs_in(["done"])}
    worker = start_server("worker", "--home", config.home)
    worker.wait_for(lambda: all_ended(queue))
    assert start_server("worker", "--home", config.home).finish().is_one_clear_line()
    assert worker.send(signal.SIGTERM).code == 0
    ends = {job.id: job for job in queue.jobs_in(FINISHED)}
    assert {job.id: "done" for job in jobs} == {name: job.state for name, job in ends.items()}
    assert all(ends[name].finished == finished for name, finished in done.items())
    assert all(len(queue.files(job)) == 2 and all(map(Image.open, queue.files(job))) for job in ends.values())


def test_a_dead_workers_jobs_are_taken_over(make_server, open_queue, start_worker, start_server, tiny_run, monkeypatch):
    """By a worker of another name, which need not be started anew."""
    monkeypatch.setattr("improved_diffusion.serving.worker.SECONDS_BETWEEN_SIGNS", 0.1)
    config = make_server(tiny_run, {"batch_size": 1})
    queue = open_queue(config)
    jobs = [queue.submit("A", a_job(seed, steps=20, n=4)).job for seed in range(2)]
    dead = start_server("worker", "--home", config.home, "--name", "dead")
    dead.wait_for(lambda: queue.jobs_in(["running"]))
    dead.send(signal.SIGKILL)
    start_worker(config, {"class": FakeDrawer(0)})
    time.sleep(0.5)
    assert "running" in {queue.job(job.id).state for job in jobs}, "it may be alive"
    with queue.engine.begin() as connection:
        connection.execute(workers.update().where(workers.c.id == "dead").values(heartbeat=time.time() - 100))
    wait_until(lambda: all_ended(queue))
    assert {queue.job(job.id).state for job in jobs} == {"done"}


def test_a_worker_that_cannot_draw_says_why(make_server, run_script, tmp_path):
    for pixel in (tmp_path / "no run", None):
        config = make_server(pixel)
        assert run_script("serve.py", "worker", "--home", config.home).is_one_clear_line(), pixel
