"""The connection to Telegram: the token and where it may show, patience with limits, and updates that are acknowledged
when they have been dealt with."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Awaitable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from aiogram import Bot, Dispatcher
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.session.middlewares.base import BaseRequestMiddleware, NextRequestMiddlewareType
from aiogram.client.telegram import TelegramAPIServer
from aiogram.exceptions import TelegramAPIError, TelegramRetryAfter, TelegramUnauthorizedError
from aiogram.methods import TelegramMethod
from aiogram.methods.base import Response, TelegramType
from aiogram.types import Update

from improved_diffusion.errors import UserError

TOKEN, TOKEN_FILE = "TELEGRAM_TOKEN", "TELEGRAM_TOKEN_FILE"  # of the environment
TRIES = 8  # of a call that Telegram puts off
SECONDS_OF_POLL = 10  # for which Telegram holds a request for updates
SECONDS_OF_ALBUM = 2.0  # until all messages of an album have come
UPDATES = ["message", "callback_query"]

log = logging.getLogger(__name__)


def read_token(file: Path | None = None) -> str:
    """The bot's token, from a file or the environment: on a command line everybody on the machine could see it.

    Raises:
        UserError: there is none, or what is there is none.
    """
    named = file or (Path(os.environ[TOKEN_FILE]) if TOKEN_FILE in os.environ else None)
    try:
        token = named.read_text().strip() if named is not None else os.environ.get(TOKEN, "").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"the bot's token cannot be read from {named}: {error}") from error
    if not token:
        raise UserError(f"the bot has no token: get one from @BotFather, and put it into {TOKEN}, or a file, --token")
    if not re.fullmatch(r"[0-9]+:[\w-]+", token):
        raise UserError(f"what is in {named or TOKEN} is no token of a bot, which is a number, a colon and letters")
    return token


class RedactingFormatter(logging.Formatter):
    """Formats without the token, which is in the address of every call and every file."""

    def __init__(self, token: str):
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self.token = token

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace(self.token, "TOKEN")


def open_bot(token: str, server: str | None = None) -> Bot:
    """The connection; `server` is the address of another Bot API server than Telegram's own."""
    api = {} if server is None else {"api": TelegramAPIServer.from_base(server)}
    session = AiohttpSession(**api)
    session.middleware(_Patience())
    return Bot(token, session=session)


class _Patience(BaseRequestMiddleware):
    """Makes a call again when Telegram says after how long it may be made (429). Nothing of it was done before."""

    async def __call__(
        self, make_request: NextRequestMiddlewareType[TelegramType], bot: Bot, method: TelegramMethod[TelegramType]
    ) -> Response[TelegramType]:
        for _ in range(TRIES - 1):
            try:
                return await make_request(bot, method)
            except TelegramRetryAfter as error:
                log.info("%s is put off by %s s", type(method).__name__, error.retry_after)
                await asyncio.sleep(error.retry_after)
        return await make_request(bot, method)


class Updates:
    """Feeds updates to a dispatcher: those of a chat one after the other, those of several chats at once.

    Telegram is told that an update has come when it has been dealt with, and all before it; until then it would send
    it again to a bot that was started anew. So a handler may run twice, and has to bear that.

    A handler may return a coroutine: what is to be done when the messages have been read that come at once with its
    own, as those of an album do.
    """

    def __init__(self, bot: Bot, dispatcher: Dispatcher):
        self.bot = bot
        self.dispatcher = dispatcher
        self._chats: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()

    async def run(self) -> None:
        """Until it is cancelled, or Telegram no longer knows the token (TelegramUnauthorizedError)."""
        tasks: dict[int, asyncio.Task[None]] = {}  # by the number of the update
        offset = 0
        while True:
            under_way = [number for number, task in tasks.items() if not task.done()]
            offset = min(under_way, default=max(tasks, default=offset - 1) + 1)
            tasks = {number: task for number, task in tasks.items() if number >= offset}
            new = [update for update in await self._ask(offset, bool(tasks)) if update.update_id not in tasks]
            for update in new:
                tasks[update.update_id] = asyncio.create_task(self._feed(update))
            if not new and under_way:
                await asyncio.wait([tasks[number] for number in under_way], timeout=0.2)

    async def _ask(self, offset: int, at_once: bool) -> list[Update]:
        seconds = 0 if at_once else SECONDS_OF_POLL
        try:
            return await self.bot.get_updates(
                offset=offset, timeout=seconds, allowed_updates=UPDATES, request_timeout=seconds + 30
            )
        except TelegramUnauthorizedError:
            raise
        except TelegramAPIError as error:  # it is away, or another bot asks with the same token
            log.warning("no updates: %s", error)
            await asyncio.sleep(1)
            return []

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
