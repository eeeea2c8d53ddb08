"""Conversations with the bot, over HTTP, through a Bot API server of our own. What draws is played by the tests."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from PIL import Image

from improved_diffusion.errors import UserError
from improved_diffusion.serving.commands.bot import serve_bot
from improved_diffusion.serving.ledger import Ledger
from improved_diffusion.serving.queue import JobQueue
from improved_diffusion.serving.records import Records
from improved_diffusion.serving.words import in_words
from tests.serving.conftest import wait_until
from tests.serving.fake_telegram import TOKEN, Call, FakeTelegram
from tests.serving.test_uploads import JPEG, REFUSED, with_place


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """The bot, before it is forked, and not as soon as tests are collected: aiogram takes seconds."""
    from improved_diffusion.serving.bot import connection, conversation, courier, packs, updates  # noqa: F401


@pytest.fixture
def telegram() -> Iterator[FakeTelegram]:
    fake = FakeTelegram()
    yield fake
    fake.close()


class RunningBot:
    """The bot in a thread of this process."""

    def __init__(self, queue: JobQueue, telegram: FakeTelegram):
        self.loop = asyncio.new_event_loop()
        self.task = self.loop.create_task(serve_bot(queue, TOKEN, telegram.address))
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(asyncio.gather(self.task, return_exceptions=True))
        for task in (left := asyncio.all_tasks(self.loop)):  # as asyncio.run does
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.task.cancel)
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def start_bot(telegram, monkeypatch) -> Iterator[Callable[[JobQueue], RunningBot]]:
    monkeypatch.setattr("improved_diffusion.serving.bot.courier.SECONDS_BETWEEN_LOOKS", 0.05)
    monkeypatch.setattr("improved_diffusion.serving.bot.courier.SECONDS_BETWEEN_EDITS", 0.1)
    monkeypatch.setattr("improved_diffusion.serving.bot.updates.SECONDS_OF_POLL", 1)
    started: list[RunningBot] = []

    def start(queue: JobQueue) -> RunningBot:
        started.append(RunningBot(queue, telegram))
        return started[-1]

    yield start
    for bot in started:
        if bot.thread.is_alive():
            bot.stop()


def draw(queue: JobQueue, *job_ids: str, n: int = 1) -> None:
    """Play the worker."""
    records = Records(queue.config, queue.engine)
    for job in records.begin(job_ids):
        records.finish(job, [Image.new("RGB", (8, 8), (job.request.seed % 256, number, 0)) for number in range(n)])


def test_a_conversation(make_server, open_queue, telegram, start_bot):
    queue = open_queue(make_server())
    start_bot(queue)
    telegram.say("/start")
    wait_until(lambda: telegram.texts())
    assert "/prompt" in telegram.texts()[0]
    assert "waffles" in telegram.texts()[0]
    number = telegram.say("/class creme brulee 2")
    wait_until(lambda: len(telegram.texts()) == 2)
    assert telegram.texts()[1] == "Place 1 in the queue, about 5 seconds"
    (job,) = queue.jobs_of("telegram:7")
    assert (job.id, job.request.class_name, job.request.n) == (f"telegram-7-{number}", "creme_brulee", 2)
    records = Records(queue.config, queue.engine)
    records.begin([job.id])
    records.report([job.id], 0.5)
    wait_until(lambda: "Drawing: 50 %" in [call.values["text"] for call in telegram.of("editMessageText")])
    draw(queue, job.id, n=2)
    wait_until(lambda: telegram.of("editMessageText")[-1].values["text"] == "Done")
    assert telegram.pictures() == [file.read_bytes() for file in queue.files(queue.job(job.id))]
    telegram.say("/style dog")
    telegram.say("/prompt a dog in the snow")
    wait_until(lambda: len(telegram.texts()) == 4)
    assert telegram.texts()[2].startswith("Your style: dog.")
    job = queue.jobs_of("telegram:7")[-1]
    assert (job.request.prompt, job.request.style) == ("a dog in the snow", "dog")
    telegram.say("/status")
    wait_until(lambda: len(telegram.texts()) == 5)
    assert telegram.texts()[4].startswith("a dog in the snow: Place 1 in the queue")
    draw(queue, job.id)
    wait_until(lambda: len(telegram.pictures()) == 3)
    telegram.say("/result")
    wait_until(lambda: len(telegram.texts()) == 6)
    assert telegram.texts()[5].startswith("Everything that is done was sent")
    telegram.say("/delete_me")
    wait_until(lambda: len(telegram.texts()) == 7)
    assert "2 jobs" in telegram.texts()[6]
    assert queue.jobs_of("telegram:7") == []
    assert len(telegram.pictures()) == 3


def test_what_cannot_be_had_is_an_answer(make_server, open_queue, telegram, start_bot):
    queue = open_queue(make_server(queued_per_user=1, queued=2))
    start_bot(queue)
    telegram.say("/class stone")
    telegram.say("/prompt")
    telegram.say("/style cat")
    telegram.say("/class waffles 99")
    telegram.say("/class waffles")
    telegram.say("/class waffles")
    wait_until(lambda: len(telegram.texts()) == 6)
    answers = telegram.texts()
    for part, answer in zip(
        ("no class 'stone'", "empty", "no style 'cat'", "1 to 4", "Place 1", "1 jobs"), answers, strict=True
    ):
        assert part in answer
    telegram.say("/class waffles", user=8)
    wait_until(lambda: telegram.texts(8))
    telegram.say("/class waffles", user=9)
    wait_until(lambda: telegram.texts(9))
    assert telegram.texts(9)[0].startswith("busy: 2 jobs are under way")


def test_jobs_are_cancelled_by_button_and_by_command(make_server, open_queue, telegram, start_bot):
    queue = open_queue(make_server())
    start_bot(queue)
    for _ in range(3):
        telegram.say("/class waffles")
    wait_until(lambda: len(telegram.texts()) == 3)
    telegram.press(telegram.of("sendMessage")[1], user=8)  # it is not his
    telegram.press(telegram.of("sendMessage")[1])
    wait_until(lambda: [call.values["text"] for call in telegram.calls if call.method == "answerCallbackQuery"][1:])
    assert [job.state for job in queue.jobs_of("telegram:7")] == ["queued", "cancelled", "queued"]
    telegram.say("/cancel")
    wait_until(lambda: len(telegram.texts()) == 4)
    assert telegram.texts()[3] == "2 cancelled."
    assert {job.state for job in queue.jobs_of("telegram:7")} == {"cancelled"}


def test_pictures_are_taken_and_hostile_files_answered(make_server, open_queue, telegram, start_bot):
    queue = open_queue(make_server(upload_bytes=300_000, upload_pixels=1_000_000, upload_side=64))
    start_bot(queue)
    telegram.send_file(with_place(), "as a drawing", photo=True)
    telegram.send_file(JPEG, "one caption", media_group_id="album")
    telegram.send_file(JPEG, None, media_group_id="album")
    telegram.send_file(JPEG)
    telegram.send_file(JPEG, None, media_group_id="another", user=9)
    telegram.send_file(JPEG, "a later caption", media_group_id="another", user=9)
    for number, (data, _) in enumerate(REFUSED.values()):
        telegram.send_file(data, "a picture", user=100 + number)
    wait_until(lambda: len(telegram.texts()) == 4)
    first, *album = queue.jobs_of("telegram:7")
    kept = Image.open(queue.config.uploads / first.request.upload)
    assert (kept.size, kept.info, first.request.prompt) == ((43, 64), {}, "as a drawing")
    assert [job.request.prompt for job in album] == ["one caption"] * 2
    assert "with a caption" in telegram.texts()[3]
    wait_until(lambda: len(telegram.texts(9)) == 2)
    assert [job.request.prompt for job in queue.jobs_of("telegram:9")] == ["a later caption"]
    for number in range(len(REFUSED)):
        wait_until(lambda: telegram.texts(100 + number))  # noqa: B023
        (answer,) = telegram.texts(100 + number)
        assert answer.endswith(".")
        assert "went wrong" not in answer
        assert queue.jobs_of(f"telegram:{100 + number}") == []
    telegram.say("/status", user=100)
    wait_until(lambda: len(telegram.texts(100)) == 2)


def test_telegrams_limits_are_kept(make_server, open_queue, telegram, start_bot):
    """A call that is put off is made again; who is put off keeps no other waiting; the result comes once."""
    queue = open_queue(make_server())
    puts_off = {"sendMessage": 2, "sendPhoto": 3}

    def refuse(call: Call):
        if call.values.get("chat_id") == "7" and puts_off.get(call.method):
            puts_off[call.method] -= 1
            return 429, {"description": "Too Many Requests: retry after 1", "parameters": {"retry_after": 1}}
        return None

    telegram.refuse = refuse
    start_bot(queue)
    telegram.say("/class waffles")
    telegram.say("/class waffles", user=8)
    wait_until(lambda: telegram.texts(8))
    assert telegram.texts(7) == []
    wait_until(lambda: len(queue.jobs_in(["queued"])) == 2)
    draw(queue, *[job.id for job in queue.jobs_in(["queued"])])
    wait_until(lambda: telegram.pictures(8))
    assert telegram.pictures(7) == []
    wait_until(lambda: telegram.pictures(7))
    wait_until(lambda: telegram.texts(7))
    assert puts_off == {"sendMessage": 0, "sendPhoto": 0}
    assert (len(telegram.pictures(7)), len(telegram.texts(7))) == (1, 1)


def test_a_result_that_may_have_arrived_is_sent_again_only_when_asked_for(make_server, open_queue, telegram, start_bot):
    queue = open_queue(make_server())
    telegram.break_off = lambda call: call.method == "sendPhoto"
    bot = start_bot(queue)
    telegram.say("/class waffles")
    wait_until(lambda: telegram.texts())
    draw(queue, *[job.id for job in queue.jobs_in(["queued"])])
    wait_until(lambda: telegram.pictures())
    bot.stop()
    telegram.break_off = lambda call: False
    start_bot(queue)
    telegram.say("/status")
    wait_until(lambda: len(telegram.texts()) == 2)
    assert len(telegram.pictures()) == 1
    telegram.say("/result")
    wait_until(lambda: len(telegram.pictures()) == 2)
    telegram.say("/result")
    wait_until(lambda: len(telegram.texts()) == 3)
    assert len(telegram.pictures()) == 2


def test_who_has_blocked_the_bot_is_left_alone(make_server, open_queue, telegram, start_bot):
    queue = open_queue(make_server())
    start_bot(queue)
    telegram.say("/class waffles")
    telegram.say("/class waffles", user=8)
    wait_until(lambda: telegram.texts(8) and telegram.texts(7))
    tries = []

    def refuse(call: Call):
        if call.values.get("chat_id") == "7":
            tries.append(call.method)
            return 403, "Forbidden: bot was blocked by the user"
        return None

    telegram.refuse = refuse
    draw(queue, *[job.id for job in queue.jobs_in(["queued"])])
    wait_until(lambda: telegram.pictures(8))
    wait_until(lambda: "sendPhoto" in tries)
    telegram.say("/status", user=8)
    wait_until(lambda: len(telegram.texts(8)) == 2)
    assert tries.count("sendPhoto") == 1


def test_a_failed_job_is_explained(make_server, open_queue, telegram, start_bot):
    queue = open_queue(make_server())
    start_bot(queue)
    telegram.say("/class waffles")
    wait_until(lambda: telegram.texts())
    records = Records(queue.config, queue.engine)
    records.fail(*records.begin([job.id for job in queue.jobs_in(["queued"])]), "the device has too little memory")
    wait_until(lambda: len(telegram.texts()) == 2)
    assert telegram.texts()[1] == "waffles: the device has too little memory."


def send_too_much(telegram: FakeTelegram, user: int) -> None:
    """Messages whose answers are put off."""
    put_off = 429, {"description": "Too Many Requests", "parameters": {"retry_after": 3600}}
    telegram.refuse = lambda call: put_off if call.values.get("chat_id") == f"{user}" else None
    for _ in range(230):
        telegram.say("/status", user=user)


def test_a_slow_chat_keeps_no_other_waiting(make_server, open_queue, telegram, start_bot):
    """However much comes from it; and nothing of it is lost when the bot is started anew."""
    from improved_diffusion.serving.bot.updates import Inbox

    queue = open_queue(make_server())
    bot = start_bot(queue)
    send_too_much(telegram, user=8)
    for user in (7, 9):
        telegram.say("/status", user=user)
        wait_until(lambda: telegram.texts(user))  # noqa: B023
    assert telegram.texts(8) == []
    wait_until(lambda: telegram.unacknowledged < 100)
    bot.stop()
    telegram.refuse = lambda call: None
    start_bot(queue)
    wait_until(lambda: len(telegram.texts(8)) == 230)
    wait_until(lambda: not telegram.unacknowledged)
    wait_until(lambda: not Inbox(queue.engine).read())
    assert len(telegram.texts(8)) == 230


def test_a_chat_that_sends_without_end_keeps_no_other_waiting(
    make_server, open_queue, telegram, start_bot, monkeypatch
):
    monkeypatch.setattr("improved_diffusion.serving.bot.updates.KEPT", 60)
    monkeypatch.setattr("improved_diffusion.serving.bot.updates.KEPT_OF_CHAT", 20)
    queue = open_queue(make_server())
    bot = start_bot(queue)
    send_too_much(telegram, user=8)
    telegram.say("/status", user=7)
    wait_until(lambda: telegram.texts(7))
    bot.stop()
    telegram.refuse = lambda call: None
    start_bot(queue)
    wait_until(lambda: len(telegram.texts(8)) >= 20)
    wait_until(lambda: not telegram.unacknowledged)
    assert len(telegram.texts(8)) < 230


def test_a_gateway_that_answers_for_telegram_is_waited_for(make_server, open_queue, telegram, start_bot):
    """With a page for people, as proxies do."""
    queue = open_queue(make_server())
    start_bot(queue)
    telegram.say("/status")
    wait_until(lambda: telegram.texts())
    telegram.is_away = True
    time.sleep(2)  # until it has asked in vain
    telegram.say("/status")
    time.sleep(1)
    telegram.is_away = False
    wait_until(lambda: len(telegram.texts()) == 2)


def test_kill_the_bot_and_nothing_is_lost(make_server, open_queue, telegram, start_server, tmp_path):
    """Messages come while it is dead, and results too; the token is in no log."""
    queue = open_queue(make_server())
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    arguments = ("bot", "--home", queue.config.home, "--server", telegram.address, "--token", tmp_path / "token")
    logs, ledger = [], Ledger(queue.engine)
    for round_ in range(3):
        for _ in range(2):
            telegram.say("/class waffles")
        bot = start_server(*arguments)
        bot.wait_for(lambda: len(queue.jobs_of("telegram:7")) == 2 * (round_ + 1))  # noqa: B023
        bot.wait_for(lambda: not ledger.undelivered("telegram:") and not ledger.unsure("telegram:7"))
        if round_ < 2:
            logs.append(bot.send(signal.SIGKILL))
        draw(queue, *[job.id for job in queue.jobs_in(["queued"])])
    bot.wait_for(lambda: len(telegram.pictures()) == 6 and not telegram.unacknowledged)
    logs.append(bot.send(signal.SIGTERM))
    assert logs[-1].code == 0, logs[-1].err
    assert sorted(telegram.pictures()) == sorted(
        queue.files(job)[0].read_bytes() for job in queue.jobs_of("telegram:7")
    )
    assert all(TOKEN not in log.out + log.err for log in logs)


def test_the_token_comes_from_the_environment_or_a_file(tmp_path, monkeypatch, run_script, make_server):
    from improved_diffusion.serving.bot.connection import read_token

    for name in ("TELEGRAM_TOKEN", "TELEGRAM_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    config = make_server()
    assert run_script("serve.py", "bot", "--home", config.home).is_one_clear_line()
    monkeypatch.setenv("TELEGRAM_TOKEN", "not a token")
    with pytest.raises(UserError, match="no token of a bot"):
        read_token()
    monkeypatch.setenv("TELEGRAM_TOKEN", TOKEN)
    assert read_token() == TOKEN
    (tmp_path / "token").write_text("1:other\n")
    monkeypatch.setenv("TELEGRAM_TOKEN_FILE", str(tmp_path / "token"))
    assert read_token() == "1:other"
    with pytest.raises(UserError, match="cannot be read"):
        read_token(tmp_path / "nothing")


def test_a_wrong_token_is_one_clear_line(make_server, open_queue, telegram, run_script, monkeypatch):
    config = make_server()
    open_queue(config)
    monkeypatch.setenv("TELEGRAM_TOKEN", "1:wrong")
    outcome = run_script("serve.py", "bot", "--home", config.home, "--server", telegram.address)
    assert outcome.is_one_clear_line()
    assert "@BotFather" in outcome.err
    outcome = run_script("serve.py", "bot", "--home", config.home, "--server", "http://127.0.0.1:9")
    assert outcome.is_one_clear_line()
    assert "1:wrong" not in outcome.err


def test_logs_do_not_show_the_token():
    from improved_diffusion.serving.bot.connection import RedactingFormatter

    try:
        raise OSError(f"cannot fetch https://api.telegram.org/file/bot{TOKEN}/photo.jpg")
    except OSError as error:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "with %s", (TOKEN,), (type(error), error, None))
    assert TOKEN not in (text := RedactingFormatter(TOKEN).format(record))
    assert "photo.jpg" in text


def test_times_are_rough():
    assert [in_words(seconds) for seconds in (0.1, 12, 52, 61, 200)] == [
        *("5 seconds", "10 seconds", "50 seconds", "1 minute", "3 minutes"),
    ]
