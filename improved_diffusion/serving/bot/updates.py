"""Updates from Telegram, each of which is dealt with, by this bot or by one that is started anew."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Collection, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import sqlalchemy as sa
from aiogram import Bot, Dispatcher
from aiogram.exceptions import AiogramError, TelegramUnauthorizedError
from aiogram.types import Update

from improved_diffusion.serving.bot.conversation import user_of
from improved_diffusion.serving.database import updates

SECONDS_OF_POLL = 10  # for which Telegram holds a request for updates
SECONDS_OF_ALBUM = 2.0  # until all messages of an album have come
ASKED_FOR = ["message", "callback_query"]
WINDOW, KEPT = 50, 2000  # updates that Telegram keeps, of the 100 that it shows, and that are kept here

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Begun:
    update: Update
    task: asyncio.Task[None]


class Updates:
    """Feeds updates to a dispatcher: those of a chat one after the other, those of several chats at once.

    Telegram is told that an update has come when it has been dealt with, and all before it; until then it would send
    it again to a bot that was started anew. So a handler may run twice, and has to bear that. Telegram shows no more
    than 100 from the oldest on: where many wait, for one chat that is slow, say, they are kept in the inbox instead, so
    that others are heard.

    A handler may return a coroutine: what is to be done when the messages have been read that come at once with its
    own, as those of an album do.
    """

    def __init__(self, bot: Bot, dispatcher: Dispatcher, inbox: Inbox):
        self.bot = bot
        self.dispatcher = dispatcher
        self.inbox = inbox
        self._chats: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()

    async def run(self) -> None:
        """Until it is cancelled, or Telegram no longer knows the token (TelegramUnauthorizedError)."""
        kept = {number: self._begin(update) for number, update in (await asyncio.to_thread(self.inbox.read)).items()}
        shown: dict[int, _Begun] = {}  # what Telegram keeps, by number
        offset = 0
        while True:
            under_way = {number: begun for number, begun in shown.items() if not begun.task.done()}
            offset = min(under_way, default=max(shown, default=offset - 1) + 1)
            if len(under_way) and max(shown) - offset >= WINDOW and len(kept) < KEPT:
                await asyncio.to_thread(self.inbox.keep, {number: begun.update for number, begun in under_way.items()})
                kept |= under_way
                offset = max(shown) + 1
            shown = {number: begun for number, begun in shown.items() if number >= offset}
            done = {number for number, begun in kept.items() if begun.task.done()}
            if done:
                await asyncio.to_thread(self.inbox.remove, done)
                kept = {number: begun for number, begun in kept.items() if number not in done}
            new = [update for update in await self._ask(offset, bool(shown)) if update.update_id not in shown]
            for update in new:
                shown[update.update_id] = kept.get(update.update_id) or self._begin(update)
            if not new and shown:
                await asyncio.wait([begun.task for begun in shown.values()], timeout=0.2)

    async def _ask(self, offset: int, at_once: bool) -> list[Update]:
        seconds = 0 if at_once else SECONDS_OF_POLL
        try:
            return await self.bot.get_updates(
                offset=offset, timeout=seconds, allowed_updates=ASKED_FOR, request_timeout=seconds + 30
            )
        except TelegramUnauthorizedError:
            raise
        except AiogramError as error:  # it is away, a gateway answers for it, or another bot has the same token
            log.warning("no updates: %s", error)
            await asyncio.sleep(1)
            return []

    def _begin(self, update: Update) -> _Begun:
        return _Begun(update, asyncio.create_task(self._feed(update)))

    async def _feed(self, update: Update) -> None:
        event: Any = update.message or getattr(update.callback_query, "message", None)
        chat = event.chat.id if event is not None else 0
        lock = self._chats.setdefault(chat, asyncio.Lock())
        async with lock:
            later = await self._settle(self.dispatcher.feed_update(self.bot, update), update)
        if asyncio.iscoroutine(later):
            await asyncio.sleep(SECONDS_OF_ALBUM)
            async with lock:  # after those that wait for it by now
                await self._settle(later, update)

    async def _settle(self, handling: Awaitable[Any], update: Update) -> Any:
        try:
            return await handling
        except Exception:
            log.exception("update %s failed", update.update_id)


class Inbox:
    """Updates that Telegram no longer keeps, in the database of `engine`."""

    def __init__(self, engine: sa.Engine):
        self.engine = engine

    def read(self) -> dict[int, Update]:
        """{number: update}, in the order in which they came."""
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(updates).order_by(updates.c.id)).all()
        return {row.id: Update.model_validate(row.content) for row in rows}

    def keep(self, found: Mapping[int, Update]) -> None:
        rows = [
            {"id": number, "user": user_of(update.event), "content": plain(update)} for number, update in found.items()
        ]
        with self.engine.begin() as connection:
            connection.execute(updates.delete().where(updates.c.id.in_(found)))  # of a bot that died before it said so
            connection.execute(updates.insert(), rows)

    def remove(self, numbers: Collection[int]) -> None:
        with self.engine.begin() as connection:
            connection.execute(updates.delete().where(updates.c.id.in_(numbers)))


def plain(update: Update) -> dict[str, Any]:
    """As Telegram sent it."""
    return update.model_dump(mode="json", by_alias=True, exclude_unset=True)
