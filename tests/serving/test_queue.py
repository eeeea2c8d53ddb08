"""What a queue promises its clients before anything is drawn."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from PIL import Image

from improved_diffusion.errors import UserError
from improved_diffusion.serving.config import ServingConfig, load_serving_config
from improved_diffusion.serving.database import jobs
from improved_diffusion.serving.ledger import Ledger
from improved_diffusion.serving.queue import Busy, JobQueue
from improved_diffusion.serving.records import Records
from improved_diffusion.serving.requests import (
    KINDS,
    ImageRequest,
    ProcessRequest,
    StickerRequest,
    TextRequest,
    TuneRequest,
    listed,
    request_of,
)
from improved_diffusion.serving.upkeep import remove_expired, remove_leftovers
from improved_diffusion.serving.uploads import keep_upload
from tests.serving.conftest import OFFER, a_job
from tests.serving.test_uploads import JPEG


def in_order(queue: JobQueue) -> list[str]:
    """The queued jobs, by their places."""
    tickets = [queue.ticket(job.id) for job in queue.jobs_in(["queued"])]
    return [ticket.job.id for ticket in sorted(tickets, key=lambda ticket: ticket.place)]


def test_who_asks_for_much_waits_behind_who_asks_for_little(make_server, open_queue):
    queue = open_queue(make_server())
    for name in ("A0", "A1", "A2", "A3", "B0", "B1"):
        queue.submit(name[0], a_job(), name)
    assert in_order(queue) == ["A0", "B0", "A1", "B1", "A2", "A3"]
    Records(queue.config, queue.engine).begin(["A0", "B0", "A1"])
    queue.submit("C", a_job(), "C0")
    assert in_order(queue) == ["B1", "C0", "A2", "A3"], "who comes later does not catch up on what he did not ask for"


def test_dbos_takes_them_in_the_same_order(make_server, open_queue):
    queue = open_queue(make_server())
    for name in ("A0", "A1", "B0"):
        queue.submit(name[0], a_job(), name)
    priorities = {one.workflow_id: one.priority for one in queue.client.list_queued_workflows()}
    assert sorted(priorities, key=lambda name: (priorities[name], name)) == ["A0", "B0", "A1"]
    assert priorities["A0"] == priorities["B0"] < priorities["A1"]


def test_expected_time_counts_what_is_ahead_as_it_was_measured(make_server, open_queue):
    queue = open_queue(make_server())
    records = Records(queue.config, queue.engine)
    records.measured("class", 2.0)  # seconds of an image and step
    first, second = (queue.submit(user, a_job(n=2)) for user in "AB")
    assert (first.place, first.seconds, second.place, second.seconds) == (1, 8.0, 2, 16.0)
    records.begin([first.job.id])
    records.report([first.job.id], 0.5)
    assert queue.ticket(first.job.id).place == 0
    assert queue.ticket(second.job.id).place == 2
    assert queue.ticket(second.job.id).seconds == 12.0


def test_full_queues_answer_at_once(make_server, open_queue):
    queue = open_queue(make_server(queued=3, queued_per_user=2))
    for _ in range(2):
        queue.submit("A", a_job())
    with pytest.raises(Busy, match="you have 2 jobs"):
        queue.submit("A", a_job())
    queue.submit("B", a_job())
    with pytest.raises(Busy, match="3 jobs are under way"):
        queue.submit("C", a_job())
    assert queue.cancel(queue.jobs_of("B")[0].id, "B")
    queue.submit("C", a_job())


def test_bounds_hold_when_many_clients_submit_at_once(make_server, open_queue):
    config = make_server(queued=10, queued_per_user=4)
    queues = [open_queue(config) for _ in range(4)]
    refused = []

    def submit(queue: JobQueue) -> None:
        for number in range(5):
            try:
                queue.submit(f"user{number}", a_job())
            except Busy:
                refused.append(number)

    threads = [threading.Thread(target=submit, args=(queue,)) for queue in queues]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    accepted = queues[0].jobs_in(["queued"])
    assert (len(accepted), len(refused)) == (10, 10)
    assert sorted(job.number for job in accepted) == [job.number for job in accepted]
    assert len(queues[0].client.list_queued_workflows()) == 10


def test_a_full_disk_is_an_answer(make_server, open_queue):
    queue = open_queue(make_server(disk_bytes=100))
    job = queue.submit("A", a_job()).job
    records = Records(queue.config, queue.engine)
    records.finish(*records.begin([job.id]), [Image.effect_noise((32, 32), 50)])
    assert queue.job(job.id).state == "done"
    with pytest.raises(Busy, match="the disk is full"):
        queue.submit("A", a_job())


def test_submitting_again_changes_nothing(make_server, open_queue):
    queue = open_queue(make_server())
    first = queue.submit("A", a_job(1), "telegram-1-2", {"chat": 1}).job
    assert queue.submit("A", a_job(1), "telegram-1-2", {"chat": 1}).job == first
    assert len(queue.jobs_of("A")) == len(queue.client.list_queued_workflows()) == 1


def test_a_job_is_cancelled_by_its_user_alone(make_server, open_queue):
    queue = open_queue(make_server())
    job = queue.submit("A", a_job()).job
    assert not queue.cancel(job.id, "B")
    assert queue.cancel(job.id, "A")
    assert not queue.cancel(job.id, "A")
    assert queue.job(job.id).state == "cancelled"
    assert queue.client.list_queued_workflows() == []
    assert Records(queue.config, queue.engine).begin([job.id]) == []
    assert queue.submit("A", a_job()).job.start == 0, "what was cancelled does not count"


def test_what_kills_the_worker_is_parked(make_server, open_queue):
    queue = open_queue(make_server(attempts=2))
    job, records = queue.submit("A", a_job()).job, Records(queue.config, queue.engine)
    assert [one.attempts for _ in range(2) for one in records.begin([job.id])] == [1, 2]
    records.give_back([job.id])  # an orderly stop does not count
    assert [one.attempts for one in records.begin([job.id])] == [2]
    assert records.begin([job.id]) == []
    assert queue.job(job.id).state == "parked"
    assert "put aside" in queue.job(job.id).error


def test_a_result_is_claimed_once_by_whoever_delivers(make_server, open_queue):
    queue = open_queue(make_server())
    records, ledgers = Records(queue.config, queue.engine), [Ledger(queue.engine), Ledger(queue.engine)]
    done, gone, cancelled = (queue.submit(user, a_job()).job for user in ("A1", "A2", "A3"))
    queue.cancel(cancelled.id, "A3")
    assert ledgers[0].undelivered("A") == []
    for job in records.begin([done.id, gone.id]):
        records.finish(job, [Image.new("RGB", (8, 8))])
    assert [job.id for job in ledgers[0].undelivered("A")] == [done.id, gone.id]
    queue.purge("A2")
    assert [ledger.claim(job.id) for ledger in ledgers for job in (done, gone)] == [True, False, False, False]
    assert ledgers[1].undelivered("A") == []
    assert [job.id for job in ledgers[1].unsure("A1")] == [done.id]
    ledgers[0].confirm(done.id)
    assert ledgers[1].unsure("A1") == []
    ledgers[0].withdraw(done.id)
    assert [job.id for job in ledgers[1].undelivered("A")] == [done.id]


def test_expired_jobs_and_uploads_go(make_server, open_queue, tmp_path):
    queue = open_queue(make_server(results_hours=1))
    records = Records(queue.config, queue.engine)
    old, new = (queue.submit("A", a_job()).job for _ in range(2))
    for job in records.begin([old.id, new.id]):
        records.finish(job, [Image.new("RGB", (8, 8))])
    with queue.engine.begin() as connection:
        connection.execute(jobs.update().where(jobs.c.id == old.id).values(finished=time.time() - 3700))
    assert all(file.is_file() for file in queue.files(queue.job(old.id)))
    assert remove_expired(queue) == 1
    assert [job.id for job in queue.jobs_of("A")] == [new.id]
    assert [folder.name for folder in queue.config.results.iterdir()] == [new.id]
    assert remove_expired(queue) == 0


def test_nothing_is_left_of_a_purged_user(make_server, open_queue, run_script):
    queue = open_queue(make_server())
    records = Records(queue.config, queue.engine)
    done, running = (queue.submit("telegram:7", a_job(), origin={"chat": 7}).job for _ in range(2))
    queue.submit("telegram:77", a_job())
    queue.choose_style("telegram:7", "dog")
    records.finish(*records.begin([done.id]), [Image.new("RGB", (8, 8))])
    (begun,) = records.begin([running.id])
    refused = run_script("serve.py", "purge-user", "7", "--home", queue.config.home)
    assert refused.is_one_clear_line()
    assert "telegram:NUMBER" in refused.err
    outcome = run_script("serve.py", "purge-user", "telegram:7", "--home", queue.config.home)
    assert outcome.code == 0
    assert outcome.out.startswith("2 jobs of telegram:7 removed")
    records.finish(begun, [Image.new("RGB", (8, 8))])  # which the worker was drawing
    assert list(queue.config.results.iterdir()) == []
    with queue.engine.connect() as connection:
        tables = sa.inspect(queue.engine).get_table_names()
        left = {table: connection.exec_driver_sql(f"SELECT * FROM {table}").all() for table in tables}
    assert "telegram:77" in str(left)
    assert "telegram:7'" not in str(left)
    assert done.id not in str(left)


@pytest.mark.parametrize("fails", ["cancel_workflows", "delete_workflows"])
def test_a_purge_that_fails_can_be_made_again(make_server, open_queue, monkeypatch, fails):
    """The database is away at any moment of it."""
    queue = open_queue(make_server())
    queue.submit("A", a_job())
    name = keep_upload(queue, "A", JPEG)
    with monkeypatch.context() as patch:
        patch.setattr(queue.client, fails, is_away)
        with pytest.raises(sa.exc.OperationalError):
            queue.purge("A")
    assert queue.purge("A") == 1
    assert queue.client.list_workflows() == []
    assert not (queue.config.uploads / name).exists()


def test_uploads_that_nobody_recorded_go(make_server, open_queue, monkeypatch):
    queue = open_queue(make_server())
    kept = keep_upload(queue, "A", JPEG)
    with monkeypatch.context() as patch:
        patch.setattr("improved_diffusion.serving.uploads.put", is_away)
        with pytest.raises(sa.exc.OperationalError):
            keep_upload(queue, "B", JPEG)
    remove_leftovers(queue)
    assert len(list(queue.config.uploads.iterdir())) == 2, "it may be about to be recorded"
    for file in queue.config.uploads.iterdir():
        os.utime(file, times=(0, 0))
    remove_leftovers(queue)
    assert [file.name for file in queue.config.uploads.iterdir()] == [kept]


def is_away(*_: object, **__: object) -> None:
    raise sa.exc.OperationalError("INSERT", {}, Exception("database is locked"))


def test_many_names_fit_into_a_message():
    names = [f"class_{i}" for i in range(1000)]
    text = listed(names)
    *first, last = text.split(", ")
    assert first == names[: len(first)]
    assert last == f"class_{len(first)} and {1000 - len(first) - 1} more"
    assert 2900 < len(text) < 3100
    assert listed(names[:3]) == "class_0, class_1, class_2"


def test_requests_are_checked_before_they_are_queued(make_server, open_queue):
    queue = open_queue(make_server(images=4, steps=50))
    for request, complaint in {
        a_job(n=5): "1 to 4 images",
        a_job(n=0): "1 to 4 images",
        a_job(steps=51): "1 to 50 steps",
        a_job(class_name="stone"): "no class 'stone'; there are: apple_pie",
        a_job(seed=-1): "seed must be",
        a_job(guidance_scale=float("nan")): "guidance scale",
        TextRequest(prompt=" "): "prompt is empty",
        TextRequest(prompt="a" * 501): "at most 500 letters",
        TextRequest(prompt="a\0dog"): "letters that are none",
        TextRequest(prompt="a dog", negative_prompt="\ud800"): "letters that are none",
        TextRequest(prompt="a dog", style="cat"): "no style 'cat'; there are: dog",
        TextRequest(prompt="a dog", style="dog", unet_scale=3.0): "from 0 to 2, not 3",
        TextRequest(prompt="a dog", text_encoder_scale=0.5): "choose one, or leave them at 1",
        ProcessRequest(class_name="waffles", n=2): "one image at a time",
        ImageRequest(prompt="a dog", upload="x", strength=0.01): "raise one of them",
        ImageRequest(prompt="a dog", upload="x"): "send it again",
    }.items():
        with pytest.raises(UserError, match=complaint):
            queue.submit("A", request)
    Records(queue.config, queue.engine).publish({**OFFER, "kinds": ["text"]})
    with pytest.raises(UserError, match="draws no class jobs"):
        queue.submit("A", a_job())
    assert queue.jobs_of("A") == []


def test_requests_survive_the_queue():
    examples = (
        a_job(3, n=2),
        ProcessRequest(class_name="waffles", seed=4),
        TextRequest(prompt="a dog", style="dog"),
        ImageRequest(prompt="a", upload="b"),
        StickerRequest(upload="b", restyle=False),
        TuneRequest(name="rex", class_name="dog", uploads=("b",)),
    )
    assert {type(example) for example in examples} == set(KINDS.values())
    for example in examples:
        assert request_of(example.plain()) == example


def test_a_home_keeps_its_settings_and_its_queue(make_server, open_queue, run_script):
    config = make_server()
    queue = open_queue(config)
    queue.submit("A", a_job())
    outcome = run_script("serve.py", "init", "--home", config.home, "--limits.queued", 7)
    assert Path(config.home).stat().st_mode & 0o777 == 0o700
    assert outcome.code == 0
    changed = load_serving_config(config.home)
    assert (changed.limits.queued, changed.models, changed.port) == (7, config.models, 0)
    assert len(queue.jobs_of("A")) == 1
    outcome = run_script("serve.py", "status", "--home", config.home)
    assert "1 queued" in outcome.out
    assert "none is alive" in outcome.out


def test_mistakes_are_one_line(run_script, tmp_path):
    for arguments in (
        ["status", "--home", tmp_path / "nowhere"],
        ["init", "--home", tmp_path, "--limits.queued", "many"],
        ["init", "--home", tmp_path, "--limits.queued", "0"],
        ["init", "--home", tmp_path, "--database", "mysql://x"],
        ["init", "--home", tmp_path, "--models.base=null", "--models.styles", "{dog: runs/dog}"],
        ["dance"],
    ):
        assert run_script("serve.py", *arguments).is_one_clear_line(), arguments


def test_a_damaged_queue_is_one_clear_line(make_server, run_script):
    config = make_server()
    file = Path(config.home) / "queue.sqlite"
    file.write_bytes(b"nothing that SQLite knows" * 1000)
    for command in (["status"], ["purge-user", "telegram:1"], ["init"]):
        outcome = run_script("serve.py", *command, "--home", config.home)
        assert outcome.is_one_clear_line()
        assert "queue.sqlite" in outcome.err


def test_clients_are_told_when_no_worker_ever_was(make_server):
    queue = JobQueue(make_server())
    with pytest.raises(UserError, match=r"serve\.py worker"):
        queue.submit("A", a_job())
    queue.close()


def test_settings_lie_within_their_home():
    assert ServingConfig(home="x").database_url.endswith("x/queue.sqlite")
