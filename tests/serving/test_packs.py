"""The bot and stickers: from a photo into a pack, and out of it again."""

from __future__ import annotations

import json

import pytest
from PIL import Image, ImageDraw

from improved_diffusion.serving.database import packs
from improved_diffusion.serving.queue import JobQueue
from improved_diffusion.serving.records import Encoded, Records
from improved_diffusion.serving.requests import StickerRequest
from improved_diffusion.stickers.finish import encode, finish
from tests.serving.conftest import wait_until
from tests.serving.fake_telegram import Call, FakeTelegram
from tests.serving.test_bot import start_bot, telegram  # noqa: F401
from tests.serving.test_stickers import EVERYTHING
from tests.serving.test_uploads import REFUSED, disc

FIRST = "u7_1_by_fake_bot"
LINK = f"https://t.me/addstickers/{FIRST}"


@pytest.fixture
def queue(make_server, open_queue) -> JobQueue:
    """Of a server that makes stickers."""
    opened = open_queue(make_server(upload_bytes=300_000, upload_pixels=1_000_000))
    Records(opened.config, opened.engine).publish(EVERYTHING)
    return opened


def sticker(number: int) -> Encoded:
    cut = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(cut).ellipse((4, 4, 40 + number % 20, 60), fill=(number % 256, 80, 0, 255))
    return Encoded(encode(finish(cut), "webp"), ".webp")


def make_all(queue: JobQueue) -> None:
    """Play the worker."""
    records = Records(queue.config, queue.engine)
    for job in records.begin([job.id for job in queue.jobs_in(["queued"])]):
        records.finish(job, [sticker(job.number)])


def a_sticker(queue: JobQueue, telegram: FakeTelegram, caption: str | None = None) -> Call:  # noqa: F811
    """Send a photo and wait for what comes."""
    before = len(telegram.of("sendSticker"))
    telegram.send_file(disc(), caption, photo=True)
    wait_until(lambda: queue.jobs_in(["queued"]))
    make_all(queue)
    wait_until(lambda: len(telegram.of("sendSticker")) > before)
    return telegram.of("sendSticker")[-1]


def press(telegram: FakeTelegram, call: Call, button: str, user: int = 7) -> str:  # noqa: F811
    """What the bot says to it."""
    name = telegram.press(call, user, button)

    def answers() -> list[str]:
        to_it = [call for call in telegram.calls if call.values.get("callback_query_id") == name]
        return [call.values.get("text", "") for call in to_it]

    wait_until(answers)
    return answers()[0]


def buttons(call: Call) -> list[str]:
    rows = json.loads(call.values["reply_markup"])["inline_keyboard"]
    return [one.get("url", one["text"]) for row in rows for one in row]


def test_a_photo_becomes_a_sticker_of_a_pack(queue, telegram, start_bot):  # noqa: F811
    start_bot(queue)
    first = a_sticker(queue, telegram)
    (job,) = queue.jobs_of("telegram:7")
    assert job.request == StickerRequest(upload=job.request.upload, seed=job.request.seed)
    assert first.files == [queue.files(job)[0].read_bytes()]
    assert buttons(first) == ["Add to my pack", "As a file"]
    assert press(telegram, first, "Add to my pack") == "It is in your pack."
    (name,) = telegram.stickers.sets[FIRST]
    assert telegram.stickers.content[name] == first.files[0]
    changed = telegram.of("editMessageReplyMarkup")[-1]
    assert changed.values["message_id"] == str(first.values["message_id"])
    assert buttons(changed) == ["Undo", LINK, "As a file"]
    assert press(telegram, first, "Add to my pack") == "It is in your pack.", "it was pressed twice"
    second = a_sticker(queue, telegram, "/sticker a fox in {caption}")
    assert queue.jobs_of("telegram:7")[-1].request.prompt == "a fox in {caption}"
    press(telegram, second, "Add to my pack")
    assert [telegram.stickers.content[one] for one in telegram.stickers.sets[FIRST]] == [*first.files, *second.files]
    changed.values["message_id"] = first.values["message_id"]
    assert press(telegram, changed, "Undo") == "It is out of your pack."
    assert press(telegram, changed, "Undo") == "It is out of your pack.", "it was pressed twice"
    assert [telegram.stickers.content[one] for one in telegram.stickers.sets[FIRST]] == second.files
    assert buttons(telegram.of("editMessageReplyMarkup")[-1]) == ["Add to my pack", "As a file"]
    press(telegram, second, "As a file")
    (document,) = telegram.of("sendDocument")
    assert document.files == second.files
    telegram.say("/delete_me")
    wait_until(lambda: queue.jobs_of("telegram:7") == [])
    with queue.engine.connect() as connection:
        wait_until(lambda: connection.execute(packs.select()).all() == [])
    for button in ("Add to my pack", "As a file"):
        assert "send the photo again" in press(telegram, second, button)
    telegram.say("/sticker")
    wait_until(lambda: "send me a photo" in telegram.texts()[-1])


def test_captions_say_what_is_made(queue, telegram, start_bot):  # noqa: F811
    start_bot(queue)
    for caption in (None, "/sticker", "/sticker@fake_bot  a fox\nin snow ", "/stickers", "a fox"):
        telegram.send_file(disc(), caption)
    telegram.send_file(disc(), "/sticker a cat", media_group_id="album", photo=True)
    telegram.send_file(disc(), None, media_group_id="album", photo=True)
    wait_until(lambda: len(queue.jobs_of("telegram:7")) == 7)
    asked = [(job.request.kind, job.request.prompt) for job in queue.jobs_of("telegram:7")]
    expected = ["", "", "a fox\nin snow"], ["/stickers", "a fox"], ["a cat"] * 2
    kinds = ("sticker", "image", "sticker")
    assert asked == [(kind, prompt) for kind, prompts in zip(kinds, expected, strict=True) for prompt in prompts]
    for number, (data, _) in enumerate(REFUSED.values()):
        telegram.send_file(data, user=100 + number)
        wait_until(lambda: telegram.texts(100 + number))  # noqa: B023
        assert queue.jobs_of(f"telegram:{100 + number}") == []


def test_packs_roll_over_and_are_made_anew(queue, telegram, start_bot):  # noqa: F811
    start_bot(queue)
    sets = telegram.stickers.sets
    telegram.stickers.fill(FIRST)
    telegram.stickers.reserved.add("u7_2_by_fake_bot")
    first, second = a_sticker(queue, telegram), a_sticker(queue, telegram)
    press(telegram, first, "Add to my pack")
    assert {name: len(stickers) for name, stickers in sets.items()} == {FIRST: 120, "u7_3_by_fake_bot": 1}
    del sets["u7_3_by_fake_bot"]  # by its user
    press(telegram, second, "Add to my pack")
    assert [telegram.stickers.content[name] for name in sets["u7_3_by_fake_bot"]] == second.files
    shown = telegram.of("editMessageReplyMarkup")[-1]
    sets.clear()
    shown.values["message_id"] = second.values["message_id"]
    assert press(telegram, shown, "Undo") == "It is out of your pack."


def test_what_telegram_refuses_is_one_clear_line(queue, telegram, start_bot):  # noqa: F811
    start_bot(queue)
    made = a_sticker(queue, telegram)
    telegram.stickers.strangers.add("7")
    assert "press Start" in press(telegram, made, "Add to my pack")
    telegram.stickers.strangers.clear()
    telegram.refuse = lambda call: (400, "Bad Request: no") if call.method == "createNewStickerSet" else None
    assert press(telegram, made, "Add to my pack") == "Telegram has refused it: no."
    telegram.refuse = lambda call: None
    assert "send the photo again" in press(telegram, made, "Add to my pack", user=8), "it is not his"
    assert press(telegram, made, "Add to my pack") == "It is in your pack."
    assert [len(stickers) for stickers in telegram.stickers.sets.values()] == [1]


def test_nothing_is_added_twice_when_the_connection_breaks(queue, telegram, start_bot):  # noqa: F811
    """After it was added, or before; with the bot started anew; and with another sticker in between."""
    bot = start_bot(queue)
    first, second = a_sticker(queue, telegram), a_sticker(queue, telegram)
    telegram.break_off = lambda call: call.method == "createNewStickerSet"
    assert "press again" in press(telegram, first, "Add to my pack")
    bot.stop()
    start_bot(queue)
    assert press(telegram, first, "Add to my pack") == "It is in your pack."
    assert len(telegram.stickers.sets[FIRST]) == 1
    telegram.refuse = lambda call: (502, "Bad Gateway") if call.method == "addStickerToSet" else None
    assert "press again" in press(telegram, second, "Add to my pack")
    telegram.refuse = lambda call: None
    third = a_sticker(queue, telegram)
    for made in (third, second, second):
        assert press(telegram, made, "Add to my pack") == "It is in your pack."
    kept = [telegram.stickers.content[name] for name in telegram.stickers.sets[FIRST]]
    assert kept == [*first.files, *third.files, *second.files]
