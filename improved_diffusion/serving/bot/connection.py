"""The connection to Telegram: the token and where it may show, and patience with limits."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from pathlib import Path

from aiogram import Bot
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.session.middlewares.base import BaseRequestMiddleware, NextRequestMiddlewareType
from aiogram.client.telegram import TelegramAPIServer
from aiogram.exceptions import TelegramRetryAfter
from aiogram.methods import TelegramMethod
from aiogram.methods.base import Response, TelegramType

from improved_diffusion.errors import UserError

TOKEN, TOKEN_FILE = "TELEGRAM_TOKEN", "TELEGRAM_TOKEN_FILE"  # of the environment
TRIES = 8  # of a call that Telegram puts off

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
