"""The Telegram bot, until it is stopped. Its token comes from TELEGRAM_TOKEN, or a file that --token or
TELEGRAM_TOKEN_FILE names, and is never logged."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from improved_diffusion.errors import UserError
from improved_diffusion.files import exclusive
from improved_diffusion.serving.commands.options import command_parser
from improved_diffusion.serving.config import load_serving_config

if TYPE_CHECKING:
    from improved_diffusion.serving.queue import JobQueue


def run(arguments: list[str]) -> None:
    parser = command_parser("bot", __doc__)
    parser.add_argument("--token", type=Path, metavar="FILE", help="file with the token")
    parser.add_argument("--server", metavar="URL", help="of a Bot API server (default: Telegram's own)")
    options = parser.parse_args(arguments)
    config = load_serving_config(options.home)

    from improved_diffusion.serving.bot.connection import RedactingFormatter, read_token
    from improved_diffusion.serving.queue import JobQueue

    token = read_token(options.token)
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter(token))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    with exclusive(config.folder / ".bot.lock", f"a bot is at work in {config.home} already"):
        queue = JobQueue(config)
        try:
            asyncio.run(_serve_until_stopped(queue, token, options.server))
        finally:
            queue.close()


async def _serve_until_stopped(queue: JobQueue, token: str, server: str | None) -> None:
    work = asyncio.ensure_future(serve_bot(queue, token, server))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, work.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await work


async def serve_bot(queue: JobQueue, token: str, server: str | None = None) -> None:
    """Answer users and carry results to them, until it is cancelled.

    Args:
        queue: whose client it is.
        token: the bot's.
        server: address of another Bot API server than Telegram's own.

    Raises:
        UserError: Telegram cannot be reached, or does not know the token.
    """
    from aiogram import Dispatcher
    from aiogram.exceptions import AiogramError, TelegramUnauthorizedError

    from improved_diffusion.serving.bot.connection import open_bot
    from improved_diffusion.serving.bot.conversation import USERS, announce, conversation
    from improved_diffusion.serving.bot.courier import Courier
    from improved_diffusion.serving.bot.packs import pack_buttons
    from improved_diffusion.serving.bot.updates import Inbox, Updates

    bot = open_bot(token, server)
    courier, dispatcher = Courier(bot, queue, USERS), Dispatcher()
    dispatcher.include_routers(conversation(queue, courier), pack_buttons(queue, bot))
    try:
        await announce(bot)
        print(f"the bot @{(await bot.me()).username} listens", flush=True)
        await asyncio.gather(Updates(bot, dispatcher, Inbox(queue.engine)).run(), courier.run())
    except TelegramUnauthorizedError as error:
        raise UserError("Telegram does not know the bot's token: ask @BotFather for the present one") from error
    except AiogramError as error:
        raise UserError(f"Telegram cannot be reached: {str(error).replace(token, 'TOKEN')}") from error
    finally:
        await courier.finish()
        await bot.session.close()
