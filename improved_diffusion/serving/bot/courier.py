"""Carries results to their chats, once each, and says meanwhile how far they are."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator

import sqlalchemy as sa
from aiogram import Bot
from aiogram.exceptions import (
    AiogramError,
    TelegramBadRequest,
    TelegramForbiddenError,
    TelegramNotFound,
    TelegramRetryAfter,
)
from aiogram.types import FSInputFile, InlineKeyboardButton, InlineKeyboardMarkup, InputMediaPhoto

from improved_diffusion.serving.ledger import Ledger
from improved_diffusion.serving.queue import UNFINISHED, Job, JobQueue
from improved_diffusion.serving.requests import StickerRequest
from improved_diffusion.serving.words import answer_of, caption_of, describe

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_FINISH = 10.0
SECONDS_BETWEEN_EDITS = 3.0  # in a chat: Telegram allows about one message a second
REFUSALS = (TelegramBadRequest, TelegramForbiddenError, TelegramNotFound)  # Telegram has surely not sent it

CANCEL, ADD, UNDO, COPY = "cancel:", "add:", "undo:", "copy:"  # begins what pressing the button sends

log = logging.getLogger(__name__)


def cancel_button(job_id: str) -> InlineKeyboardMarkup:
    """What stands under the message of a job that is under way."""
    return InlineKeyboardMarkup(
        inline_keyboard=[[InlineKeyboardButton(text="Cancel", callback_data=f"{CANCEL}{job_id}")]]
    )


def sticker_buttons(job_id: str, pack: str | None = None) -> InlineKeyboardMarkup:
    """What stands under a sticker; with the address of the pack that it is in, the way out of there."""
    if pack is None:
        first = [InlineKeyboardButton(text="Add to my pack", callback_data=f"{ADD}{job_id}")]
    else:
        first = [
            InlineKeyboardButton(text="Undo", callback_data=f"{UNDO}{job_id}"),
            InlineKeyboardButton(text="My pack", url=pack),
        ]
    copy = InlineKeyboardButton(text="As a file", callback_data=f"{COPY}{job_id}")
    return InlineKeyboardMarkup(inline_keyboard=[first, [copy]])


class Courier:
    """Of the jobs of users whose names begin with `users`."""

    def __init__(self, bot: Bot, queue: JobQueue, users: str):
        self.bot = bot
        self.queue = queue
        self.users = users
        self.ledger = Ledger(queue.engine)
        self._chats: dict[int, asyncio.Task[None]] = {}  # at work, so that one that is slow keeps no other waiting
        self._in_hand: set[str] = set()
        self._said: dict[str, str] = {}  # {job: what its message says}
        self._edited: dict[int, float] = {}  # {chat: when}

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self.look()
            except sa.exc.SQLAlchemyError as error:  # the database is busy, or away for a moment
                log.warning("no look at the queue: %s", getattr(error, "orig", error))
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)

    async def finish(self) -> None:
        """Let what is being sent arrive."""
        if self._chats:
            await asyncio.wait(self._chats.values(), timeout=SECONDS_TO_FINISH)

    async def look(self) -> None:
        """Begin to do what there is to do in chats where nothing is being done."""
        self._chats = {chat: task for chat, task in self._chats.items() if not task.done()}
        ended = await asyncio.to_thread(self.ledger.undelivered, self.users)
        unfinished = await asyncio.to_thread(self.queue.jobs_in, UNFINISHED, self.users)
        known = {job.id for job in (*ended, *unfinished)}
        self._said = {job: text for job, text in self._said.items() if job in known}
        for chat in {job.origin["chat"] for job in (*ended, *unfinished)} - set(self._chats):
            theirs = [[job for job in some if job.origin["chat"] == chat] for some in (ended, unfinished)]
            self._chats[chat] = asyncio.create_task(self._serve(chat, *theirs))

    async def send_unsure(self, user: str) -> int:
        """Send a user again what may not have arrived, as it was asked for. Returns how many jobs."""
        unsure = await asyncio.to_thread(self.ledger.unsure, user)
        again = [job for job in unsure if job.id not in self._in_hand]
        for job in again:
            with self._holding(job):
                await self._send(job)
        return len(again)

    async def _serve(self, chat: int, ended: list[Job], unfinished: list[Job]) -> None:
        try:
            for job in ended:
                with self._holding(job):
                    if await asyncio.to_thread(self.ledger.claim, job.id):
                        await self._send(job)
            if time.monotonic() - self._edited.get(chat, 0.0) >= SECONDS_BETWEEN_EDITS:
                for job in unfinished:
                    await self._say_how_far(job)
        except Exception:
            log.exception("chat %s failed", chat)

    async def _send(self, job: Job) -> None:
        """Send a job's result, which is claimed, and note what came of it. If that is unclear the claim stands."""
        try:
            await self._send_pictures(job) if job.state == "done" else await self._send_reason(job)
        except REFUSALS as error:
            log.warning("job %s cannot be delivered: %s", job.id, error)
            await asyncio.to_thread(self.ledger.confirm, job.id, "refused")
        except TelegramRetryAfter:
            await asyncio.to_thread(self.ledger.withdraw, job.id)
        except AiogramError as error:  # the connection broke: who knows whether before or after
            log.warning("job %s may or may not have been delivered: %s", job.id, error)
        else:
            await asyncio.to_thread(self.ledger.confirm, job.id)
            await self._edit(job, "Done" if job.state == "done" else "It could not be drawn", None)

    @contextlib.contextmanager
    def _holding(self, job: Job) -> Iterator[None]:
        """What is on its way just now is not unsure."""
        self._in_hand.add(job.id)
        try:
            yield
        finally:
            self._in_hand.discard(job.id)

    async def _send_pictures(self, job: Job) -> None:
        chat, caption = job.origin["chat"], caption_of(job)
        files = [FSInputFile(file) for file in self.queue.files(job)]
        if isinstance(job.request, StickerRequest):
            await self.bot.send_sticker(chat, files[0], reply_markup=sticker_buttons(job.id))
        elif len(files) == 1:
            await self.bot.send_photo(chat, files[0], caption=caption)
        else:
            captions = [caption, *[None] * (len(files) - 1)]
            media = [InputMediaPhoto(media=file, caption=text) for file, text in zip(files, captions, strict=True)]
            await self.bot.send_media_group(chat, media)

    async def _send_reason(self, job: Job) -> None:
        await self.bot.send_message(job.origin["chat"], f"{describe(job.request)}: {job.error}.")

    async def _say_how_far(self, job: Job) -> None:
        """Edit a job's message, if there is something new to say."""
        text = answer_of(await asyncio.to_thread(self.queue.ticket, job.id))
        if text != self._said.get(job.id) and "answer" in job.origin:
            self._edited[job.origin["chat"]] = time.monotonic()
            await self._edit(job, text, cancel_button(job.id))
            self._said[job.id] = text

    async def _edit(self, job: Job, text: str, keyboard: InlineKeyboardMarkup | None) -> None:
        if "answer" not in job.origin:
            return
        try:
            await self.bot.edit_message_text(
                text, chat_id=job.origin["chat"], message_id=job.origin["answer"], reply_markup=keyboard
            )
        except AiogramError as error:  # removed by the user, or it says so already: no harm
            log.debug("message of job %s stays as it is: %s", job.id, error)
