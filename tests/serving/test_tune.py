"""Styles of users' own: learned in chunks, between which others draw; a user's alone; gone when they are removed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from improved_diffusion.checkpoint_file import read_checkpoint
from improved_diffusion.errors import UserError
from improved_diffusion.personalize.generate import Sampling, draw
from improved_diffusion.personalize.models.tuned import attach_run
from improved_diffusion.personalize.training import start
from improved_diffusion.personalize.training.memory import NotEnoughMemory
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.serving import text_drawer, tuner
from improved_diffusion.serving.database import jobs as job_table
from improved_diffusion.serving.device import Device
from improved_diffusion.serving.drawers import open_drawers
from improved_diffusion.serving.queue import Busy, Job, JobQueue
from improved_diffusion.serving.records import Records
from improved_diffusion.serving.requests import ImageRequest, Request, TextRequest, TuneRequest
from improved_diffusion.serving.tuner import Tuner, run_of, tune_config
from improved_diffusion.serving.upkeep import remove_expired, remove_leftovers
from improved_diffusion.serving.uploads import keep_upload
from improved_diffusion.serving.words import in_words
from improved_diffusion.settings import to_plain
from tests.serving.conftest import OFFER, wait_until
from tests.serving.fake_telegram import FakeTelegram
from tests.serving.test_bot import start_bot, telegram  # noqa: F401
from tests.serving.test_uploads import PHOTO, encoded

UPDATES = 6
ONE_UPDATE = 1e-9  # seconds of a chunk: it lasts until it is asked for the second time


@pytest.fixture
def queue(make_server, open_queue, fresh_base, monkeypatch) -> JobQueue:
    """Of a server with a base, whose folder is not read again and again; a chunk has one update."""
    base = fresh_base()
    for module in (start, text_drawer):
        monkeypatch.setattr(module, "load_base", lambda *_: fresh_base())
    monkeypatch.setattr(start, "load_tokenizer", lambda _: base.tokenizers[0])
    monkeypatch.setattr(start, "estimate_memory", lambda *_: "not estimated")
    monkeypatch.setattr(tuner, "SHOWN", {"seeds": (0,), "steps": 1})
    for module in (tuner, text_drawer):
        monkeypatch.setattr(module, "release_memory", lambda: None)  # to search a test's garbage takes longer than all
    limits = {"chunk_seconds": ONE_UPDATE, "styles_per_user": 2, "tunes": 3, "styles_hours": 10, "results_hours": 1}
    opened = open_queue(make_server(None, {"base": base.name, "batch_size": 1}, **limits))
    Records(opened.config, opened.engine).publish({**OFFER, "kinds": ["text", "image", "tune"]})
    return opened


def a_style(queue: JobQueue, user: str = "A", **values: object) -> TuneRequest:
    pictures = [encoded(PHOTO.rotate(number, fillcolor="red")) for number in range(2)]
    uploads = [keep_upload(queue, user, picture) for picture in pictures]
    return TuneRequest(**{"name": "rex", "class_name": "dog", "uploads": uploads, "steps": UPDATES, **values})


def finish(queue: JobQueue, job: Job, learned: bool = True) -> None:
    """Play the worker."""
    records = Records(queue.config, queue.engine)
    (begun,) = records.begin([job.id])
    records.finish(begun, [Image.new("RGB", (8, 8))]) if learned else records.fail(begun, "it cannot be learned")


def unbroken(queue: JobQueue, request: TuneRequest, folder: Path, run_script: Callable) -> RunDirectory:
    """What personalize.py makes of the same pictures and settings."""
    for number, upload in enumerate(request.uploads):
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{number:03d}.png").write_bytes((queue.config.uploads / upload).read_bytes())
    config = to_plain(tune_config(request, queue.config.models.base, folder / "data"))
    (folder / "tune.yaml").write_text(yaml.safe_dump(config))
    outcome = run_script("personalize.py", "train", "--config", folder / "tune.yaml", "--out", folder / "unbroken")
    assert outcome.code == 0, outcome.err
    return RunDirectory(folder / "unbroken")


def require_same_weights(one: RunDirectory, other: RunDirectory) -> None:
    states = [read_checkpoint(run.choose_checkpoint(None)) for run in (one, other)]
    assert states[0]["step"] == states[1]["step"] == UPDATES
    torch.testing.assert_close(states[0]["model"], states[1]["model"], rtol=0, atol=0)


class Grey:
    """Draws for the others, and notes when."""

    def __init__(self, order: list[str]):
        self.order = order

    def draw(self, requests: Sequence[Request], _: Callable) -> list[list[Image.Image]]:
        self.order.append(requests[0].prompt)
        return [[Image.new("L", (4, 4))]]

    def release(self) -> None:
        self.order.append("released")


class Noting(Tuner):
    """Notes when a chunk begins, after how many updates."""

    def __init__(self, queue: JobQueue, order: list[str]):
        super().__init__(queue.config)
        self.order = order

    def learn(self, job: Job, may_go_on: Callable) -> list[Image.Image] | None:
        run = run_of(self.config.results, job.id)
        files = run.checkpoint_files() if run.path.is_dir() else []
        self.order.append(f"from {int(files[-1].stem[-7:]) if files else 0}")
        return super().learn(job, may_go_on)


def test_others_draw_between_chunks(queue, tmp_path, run_script, monkeypatch):
    """In the order of virtual starts, and what is learned is what an unbroken run learns."""
    put_back = Records.put_back
    monkeypatch.setattr(Records, "put_back", lambda self, job, _: put_back(self, job, 10.0))  # seconds of each chunk
    records = Records(queue.config, queue.engine)
    records.measured("text", 15.0)
    request, order = a_style(queue), []
    style = queue.submit("A", request).job
    texts = [queue.submit("B", TextRequest(prompt=f"B {start}", steps=1)).job for start in (0, 15, 30, 45)]
    device = Device({"tune": Noting(queue, order), "text": Grey(order)}, records, 1, ONE_UPDATE)
    ends = [device.draw(job.id) for job in (style, *texts)]
    device.start()
    for end in ends:
        end.result(60)
    device.stop()
    # The style starts at 0, 10, 20, 30, 40 and 50.
    said = ["from 0", "B 0", "from 1", "B 15", "from 2", "from 3", "B 30", "from 4", "B 45", "from 5"]
    assert order == said
    job = queue.job(style.id)
    assert (job.state, job.attempts, job.start) == ("done", 1, 50.0)
    assert queue.files(job)[0].is_file()
    assert not run_of(queue.config.results, style.id).path.with_name("pictures").exists()
    require_same_weights(run_of(queue.config.results, style.id), unbroken(queue, request, tmp_path, run_script))


def test_a_killed_worker_costs_at_most_a_chunk(queue, tmp_path, run_script):
    class Killed(BaseException):
        pass

    def lasting(updates: int, killed: bool = False) -> Callable[[float], bool]:
        asked = iter(range(updates + 1))

        def may_go_on(_: float) -> bool:
            if next(asked) < updates:
                return True
            if killed:
                raise Killed
            return False

        return may_go_on

    request = a_style(queue)
    job, records = queue.submit("A", request).job, Records(queue.config, queue.engine)
    run = run_of(queue.config.results, job.id)
    with pytest.raises(Killed):
        Tuner(queue.config).learn(job, lasting(1, killed=True))
    assert Tuner(queue.config).learn(job, lasting(2)) is None  # and is killed after that
    assert run.latest_checkpoint() == run.checkpoint_file(2)
    with pytest.raises(Killed):
        Tuner(queue.config).learn(job, lasting(2, killed=True))
    assert run.latest_checkpoint() == run.checkpoint_file(2)
    last = Tuner(queue.config)
    assert last.learn(job, lasting(1)) is None
    pictures = last.learn(job, lasting(100))
    assert Tuner(queue.config).learn(job, lasting(0))[0].size == pictures[0].size, "killed before the end was noted"
    require_same_weights(run, unbroken(queue, request, tmp_path, run_script))
    for _ in range(queue.config.limits.attempts):  # what counts is the chunks that kill it
        (begun,) = records.begin([job.id])
        assert records.put_back(begun, 1.0).attempts == 0
    for _ in range(queue.config.limits.attempts):
        assert records.begin([job.id])
    assert records.begin([job.id]) == []
    assert queue.job(job.id).state == "parked"


def test_from_pictures_to_a_picture_in_the_style(queue, start_worker, fresh_base, monkeypatch, tmp_path):
    """With a worker that is stopped on the way; the style is its user's alone, and so are the pictures' latents."""
    monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    job = queue.submit("A", a_style(queue)).job
    worker = start_worker(queue.config, *open_drawers(queue.config))
    wait_until(lambda: queue.job(job.id).start > 0)  # one chunk is over
    worker.stop()
    stopped = queue.job(job.id)
    assert (stopped.state, stopped.attempts) == ("queued", 0)
    assert run_of(queue.config.results, job.id).checkpoint_files()
    start_worker(queue.config, *open_drawers(queue.config))
    wait_until(lambda: queue.job(job.id).state == "done")
    assert list((tmp_path / "cache").rglob("*.tensors")) == []
    assert list(queue.config.results.rglob("*.tensors")) == []
    assert queue.offer("A")["styles"] == ["rex"]
    assert queue.offer("B")["styles"] == []
    few = {"steps": 2, "guidance_scale": 3.0, "seed": 5}
    drawn = queue.submit("A", TextRequest(prompt="a {token} {class}", style="rex", **few)).job
    with pytest.raises(UserError, match="no style 'rex'"):
        queue.submit("B", TextRequest(prompt="a {token} {class}", style="rex", **few))
    for stolen in (job.id, drawn.request.style):
        with pytest.raises(UserError, match="there is no style"):
            queue.submit("B", TextRequest(prompt="a dog", style=stolen, **few))
    with pytest.raises(UserError, match="no style 'rex'"):
        queue.choose_style("B", "rex")
    queue.choose_style("A", "rex")
    wait_until(lambda: queue.job(drawn.id).state == "done")
    base = fresh_base()
    attach_run(base, run_of(queue.config.results, job.id), "rex")
    (expected,) = draw(base, ["a sks dog"], [5], Sampling(2, 3.0))
    np.testing.assert_array_equal(np.asarray(Image.open(queue.files(queue.job(drawn.id))[0])), np.asarray(expected))
    queue.purge("A")
    assert list(queue.config.results.iterdir()) == []
    assert queue.offer("A")["styles"] == []


def test_cancelling_and_want_of_memory(queue, monkeypatch):
    records, order = Records(queue.config, queue.engine), []
    monkeypatch.setattr("improved_diffusion.serving.device.SECONDS_BETWEEN_REPORTS", 0.0)
    learner = Tuner(queue.config)
    device = Device({"tune": learner, "text": Grey(order)}, records, 1, 1000.0)
    running = queue.submit("A", a_style(queue, steps=1000)).job
    end = device.draw(running.id)
    device.start()
    wait_until(lambda: queue.job(running.id).progress > 0)
    assert queue.cancel(running.id, "A")
    end.result(20)
    assert learner._kept is None
    assert queue.job(running.id).state == "cancelled"
    device.chunk_seconds = ONE_UPDATE
    put_back = Records.put_back

    def and_cancel(self: Records, job: Job, seconds: float) -> Job:
        waiting = put_back(self, job, seconds)
        assert learner._kept is not None
        queue.cancel(job.id, "A")
        return waiting

    monkeypatch.setattr(Records, "put_back", and_cancel)
    waiting = queue.submit("A", a_style(queue)).job
    device.draw(waiting.id).result(20)
    assert learner._kept is None, "nothing is kept in memory of what nobody waits for"
    remove_leftovers(queue)
    assert list(queue.config.results.iterdir()) == []

    def too_large(*_: object, **__: object) -> None:
        raise NotEnoughMemory("a training step needs about 20 GB")

    monkeypatch.setattr(start, "build", too_large)
    large = queue.submit("A", a_style(queue)).job
    device.draw(large.id).result(20)
    device.stop()
    assert "too little memory" in queue.job(large.id).error
    assert order == ["released"] * 2, "what others keep goes too"


def test_what_is_refused(queue):
    uploads = a_style(queue).uploads
    refused = {"name": "no name", "class_name": " ", "uploads": (), "steps": 1001, "n": 2, "token": ""}
    for name, value in {**refused, "uploads": uploads * 11}.items():
        with pytest.raises(UserError):
            queue.submit("A", a_style(queue, **{name: value}))
    with pytest.raises(UserError, match="send it again"):
        queue.submit("B", TuneRequest(name="rex", class_name="dog", uploads=uploads))
    first = queue.submit("A", a_style(queue)).job
    with pytest.raises(UserError, match="already"):
        queue.submit("A", a_style(queue))
    finish(queue, first)
    with pytest.raises(UserError, match="already"):
        queue.submit("A", a_style(queue))
    queue.submit("A", a_style(queue, name="second"))
    with pytest.raises(Busy, match="remove one first"):
        queue.submit("A", a_style(queue, name="third"))
    queue.choose_style("A", "rex")
    assert queue.style_of("A") == "rex"
    queue.forget_style("A", "rex")
    assert queue.style_of("A") is None
    queue.submit("A", a_style(queue, name="third"))
    queue.submit("B", a_style(queue, "B"))
    with pytest.raises(Busy, match="busy"):
        queue.submit("C", a_style(queue, "C"))
    with pytest.raises(UserError, match="no style 'rex' of your own"):
        queue.forget_style("A", "rex")


def test_styles_are_kept_longer_than_pictures(queue):
    done, failed = (queue.submit("A", a_style(queue, name=name)).job for name in ("rex", "failed"))
    unfinished = queue.submit("B", a_style(queue, "B")).job
    finish(queue, done)
    finish(queue, failed, learned=False)

    def grow_older(hours: float) -> None:
        with queue.engine.begin() as connection:
            connection.execute(job_table.update().values(finished=time.time() - 3600 * hours))

    grow_older(2)
    remove_expired(queue)
    assert queue.styles_of("A") == {"rex": done.id}
    assert len(queue.jobs_of("A")) == 1
    grow_older(11)
    remove_expired(queue)
    assert queue.styles_of("A") == {}
    assert queue.unused_uploads("B") == []
    assert queue.job(unfinished.id).state == "queued"


def test_a_chunk_keeps_a_users_next_picture_waiting_and_not_the_whole(queue):
    Records(queue.config, queue.engine).measured("tune", 100.0)
    style = queue.submit("A", a_style(queue)).job
    picture = queue.submit("A", TextRequest(prompt="a dog")).job
    assert (style.cost, picture.start) == (100.0 * UPDATES, ONE_UPDATE)
    assert queue.ticket(style.id).seconds == 600
    assert queue.ticket(picture.id).seconds < 10


def test_unused_uploads(queue):
    first, second = a_style(queue).uploads
    queue.submit("A", ImageRequest(prompt="a lawn", upload=first))
    assert queue.unused_uploads("A") == [second]
    assert set(a_style(queue).uploads) == set(queue.unused_uploads("A")), "they were sent again"


def album(fake: FakeTelegram, captions: Sequence[str | None], colour: str = "red", **more: object) -> None:
    for number, caption in enumerate(captions):
        picture = encoded(PHOTO.rotate(number, fillcolor=colour))
        fake.send_file(picture, caption, photo=True, media_group_id=f"album of {colour}", **more)


def test_an_album_becomes_a_style_in_the_chat(queue, telegram, start_bot, monkeypatch):  # noqa: F811
    """By its caption; the bot dies before all of it has come, and begins anew. The style is chosen, and forgotten."""
    monkeypatch.setattr("improved_diffusion.serving.bot.updates.SECONDS_OF_ALBUM", 60.0)
    bot = start_bot(queue)
    album(telegram, ["/tune rex dog", None])
    wait_until(lambda: len(queue.unused_uploads("telegram:7")) == 2)
    bot.stop()
    assert queue.jobs_of("telegram:7") == telegram.texts() == []
    monkeypatch.setattr("improved_diffusion.serving.bot.updates.SECONDS_OF_ALBUM", 0.2)
    start_bot(queue)
    wait_until(lambda: telegram.texts())
    (job,) = queue.jobs_of("telegram:7")
    assert (job.request.name, job.request.class_name, len(job.request.uploads)) == ("rex", "dog", 2)
    assert telegram.texts() == [f"Place 1 in the queue, about {in_words(job.cost)}"]
    records = Records(queue.config, queue.engine)
    (begun,) = records.begin([job.id])
    records.report([job.id], 0.5)
    records.put_back(begun, 1.0)
    wait_until(lambda: [call for call in telegram.of("editMessageText") if "Learning: 50 %" in call.values["text"]])
    finish(queue, job)
    wait_until(lambda: telegram.of("sendPhoto"))
    assert telegram.of("sendPhoto")[0].values["caption"].startswith("Your style rex is ready: /style rex")
    telegram.say("/style rex")
    telegram.say("/prompt {class} in the snow")
    telegram.say("/style rex", user=8)
    telegram.say("/forget rex", user=8)
    wait_until(lambda: len(telegram.texts()) == 3 and len(telegram.texts(8)) == 2)
    assert telegram.texts()[1] == "Your style: rex. Choose with /style NAME: dog, rex, none"
    assert queue.jobs_of("telegram:7")[-1].request.style == job.id
    assert telegram.texts(8)[0].startswith("there is no style 'rex'")
    telegram.say("/forget rex")
    wait_until(lambda: len(telegram.texts()) == 4)
    assert queue.styles_of("telegram:7") == {}


def test_pictures_and_then_a_command(queue, telegram, start_bot):  # noqa: F811
    start_bot(queue)
    telegram.say("/tune rex dog")
    telegram.say("/tune rex")
    album(telegram, [None, None])
    telegram.send_file(encoded(PHOTO.rotate(45)))
    telegram.say("/tune rex guide dog")
    wait_until(lambda: queue.jobs_of("telegram:7") and len(telegram.texts()) == 5)
    (job,) = queue.jobs_of("telegram:7")
    assert (job.request.class_name, len(job.request.uploads)) == ("guide dog", 3)
    texts = telegram.texts()
    for part, said in zip(
        ("send them first", "For one: /tune rex dog", "/tune", "/tune", "Place 1"), texts, strict=True
    ):
        assert part in said
