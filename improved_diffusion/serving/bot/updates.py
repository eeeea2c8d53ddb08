"""Updates from Telegram, each of which is dealt with, by this bot or by one that is started anew."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Collection, Mapping
from dataclasses import dataclass, field
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
WINDOW, KEPT = 50, 20_000  # updates that Telegram keeps, of the 100 that it shows, and that are kept here
KEPT_OF_CHAT = 500

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Begun:
    update: Update
    task: asyncio.Task[None]


@dataclass(eq=False)
class _Chat:
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0  # updates, with the one whose turn it is


def under_way(some: Mapping[int, _Begun]) -> dict[int, _Begun]:
    return {number: begun for number, begun in some.items() if not begun.task.done()}


class Updates:
    """Feeds updates to a dispatcher: those of a chat one after the other, those of several chats at once.

    Telegram is told that an update has come when it has been dealt with, and all before it; until then it would send
    it again to a bot that was started anew. So a handler may run twice, and has to bear that. Telegram shows no more
    than 100 from the oldest on: where many wait, for one chat that is slow, say, they are kept in the inbox instead, so
    that others are heard. So that no chat can fill it, what comes when KEPT_OF_CHAT of one wait is thrown away.

    A handler may return a coroutine: what is to be done when the messages have been read that come at once with its
    own, as those of an album do.
    """

    def __init__(self, bot: Bot, dispatcher: Dispatcher, inbox: Inbox):
        self.bot = bot
        self.dispatcher = dispatcher
        self.inbox = inbox
        self._shown: dict[int, _Begun] = {}  # what Telegram keeps, by number
        self._kept: dict[int, _Begun] = {}  # what the inbox keeps
        self._offset = 0  # of what Telegram shows
        self._chats: WeakValueDictionary[int, _Chat] = WeakValueDictionary()

    async def run(self) -> None:
        """Until it is cancelled, or Telegram no longer knows the token (TelegramUnauthorizedError)."""
        found = await asyncio.to_thread(self.inbox.read)
        self._kept = {number: self._begin(update) for number, update in found.items()}
        while True:
            try:
                await self._tidy_inbox()
            except sa.exc.SQLAlchemyError as error:  # the database is away: Telegram keeps them meanwhile
                log.warning("no inbox: %s", getattr(error, "orig", error))
            self._offset = min(under_way(self._shown), default=max(self._shown, default=self._offset - 1) + 1)
            self._shown = {number: begun for number, begun in self._shown.items() if number >= self._offset}
            new = [update for update in await self._ask() if update.update_id not in self._shown]
            for update in new:
                self._shown[update.update_id] = self._kept.get(update.update_id) or self._begin(update)
            if not new and self._shown:
                await asyncio.wait([begun.task for begun in self._shown.values()], timeout=0.2)

    async def _tidy_inbox(self) -> None:
        """Take out what is done, and in what Telegram would have to keep too much of."""
        done = self._kept.keys() - under_way(self._kept).keys()
        if done:
            await asyncio.to_thread(self.inbox.remove, done)
            self._kept = {number: begun for number, begun in self._kept.items() if number not in done}
        unfinished = under_way(self._shown)
        if unfinished and max(self._shown) - min(unfinished) >= WINDOW and len(self._kept) < KEPT:
            await asyncio.to_thread(self.inbox.keep, {number: begun.update for number, begun in unfinished.items()})
            self._kept |= unfinished
            self._offset, self._shown = max(self._shown) + 1, {}

    async def _ask(self) -> list[Update]:
        seconds = 0 if self._shown else SECONDS_OF_POLL  # what is done is to be acknowledged soon
        try:
            return await self.bot.get_updates(
                offset=self._offset, timeout=seconds, allowed_updates=ASKED_FOR, request_timeout=seconds + 30
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
        number = event.chat.id if event is not None else 0
        chat = self._chats.setdefault(number, _Chat())
        if chat.waiting >= KEPT_OF_CHAT:
            log.info("update %s is thrown away: %d of its chat wait", update.update_id, chat.waiting)
            return
        chat.waiting += 1
        async with chat.turn:
            later = await self._settle(self.dispatcher.feed_update(self.bot, update), update)
            chat.waiting -= 1
        if asyncio.iscoroutine(later):
            with contextlib.closing(later):
                await asyncio.sleep(SECONDS_OF_ALBUM)
                async with chat.turn:  # after those that wait for it by now
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
            {
                "id": number,
                "user": sender(update),
                "content": update.model_dump(mode="json", by_alias=True, exclude_unset=True),
            }
            for number, update in found.items()
        ]
        with self.engine.begin() as connection:
            connection.execute(updates.delete().where(updates.c.id.in_(found)))  # of a bot that died before it said so
            connection.execute(updates.insert(), rows)

    def remove(self, numbers: Collection[int]) -> None:
        with self.engine.begin() as connection:
            connection.execute(updates.delete().where(updates.c.id.in_(numbers)))


def sender(update: Update) -> str:
    event = update.message or update.callback_query
    return user_of(event) if event is not None and event.from_user is not None else ""
