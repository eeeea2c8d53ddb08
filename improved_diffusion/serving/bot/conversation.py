"""What the bot says to what it is told."""

from __future__ import annotations

import asyncio
import io
import logging
import re
import textwrap
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

from aiogram import Bot, F, Router
from aiogram.filters import Command, CommandObject, CommandStart
from aiogram.types import BotCommand, CallbackQuery, Message, TelegramObject

from improved_diffusion.data.photo import require_size
from improved_diffusion.errors import UserError
from improved_diffusion.serving.bot.courier import CANCEL, Courier, cancel_button
from improved_diffusion.serving.queue import UNFINISHED, JobQueue
from improved_diffusion.serving.requests import (
    ClassRequest,
    ImageRequest,
    Request,
    StickerRequest,
    TextRequest,
    TuneRequest,
    listed,
)
from improved_diffusion.serving.uploads import keep_upload
from improved_diffusion.serving.words import answer_of, describe

USERS = "telegram:"  # begins their names in the queue
COMMANDS = {
    "class": "pictures of a class: /class waffles 4",
    "prompt": "a picture of a text: /prompt a dog in the snow",
    "sticker": "a sticker of a photo: send it with this, and what to make of it, as its caption, or with none",
    "style": "choose a style, or see which there are",
    "tune": "learn a style from pictures that you have sent: /tune rex dog",
    "forget": "remove a style of your own: /forget rex",
    "status": "your jobs, and how long they take",
    "cancel": "cancel all that is under way",
    "result": "send again what may not have arrived",
    "delete_me": "remove everything that is kept of you",
}
MOST_OF_A_MESSAGE, MOST_OF_A_NOTICE = 4096, 200  # letters, of Telegram's; a notice answers a button
ALBUMS = 1000  # whose captions are remembered
STICKER = re.compile(r"(?:/sticker(?:@\w+)?(?:\s+(.*))?)?", re.DOTALL)  # a caption of which a sticker is made

log = logging.getLogger(__name__)


async def announce(bot: Bot) -> None:
    """Tell Telegram the commands, for its menu."""
    await bot.set_my_commands([BotCommand(command=name, description=what) for name, what in COMMANDS.items()])


def user_of(event: Message | CallbackQuery) -> str:
    return f"{USERS}{event.from_user.id}"


def conversation(queue: JobQueue, courier: Courier) -> Router:
    """All handlers. Each may be called twice for a message, and then changes nothing more."""
    return _Conversation(queue, courier).router


class _Conversation:
    def __init__(self, queue: JobQueue, courier: Courier):
        self.queue = queue
        self.courier = courier
        self._captions: dict[str, str] = {}  # of albums, of whose pictures Telegram gives one the caption
        self.router = router = Router()
        router.message.filter(F.from_user)
        router.message.outer_middleware(answer_mistakes)
        router.callback_query.outer_middleware(answer_mistakes)
        for name, handler in {
            "class": self.draw_class,
            "prompt": self.draw_text,
            "sticker": self.draw_sticker,
            "style": self.style,
            "tune": self.tune,
            "forget": self.forget,
            "status": self.status,
            "cancel": self.cancel,
            "result": self.result,
            "delete_me": self.delete_me,
        }.items():
            router.message(Command(name))(handler)
        router.message(CommandStart())(self.help)
        router.message(Command("help"))(self.help)
        router.message(F.photo | F.document)(self.draw_from_picture)
        router.message(F.text.startswith("/"))(self.help)
        router.message(F.text)(self.draw_plain_text)
        router.message()(self.help)
        router.callback_query(F.data.startswith(CANCEL))(self.press_cancel)

    async def help(self, message: Message) -> None:
        offer = await asyncio.to_thread(self.queue.offer)
        lines = [f"/{name} - {what}" for name, what in COMMANDS.items()]
        if "class" in offer["kinds"]:
            lines.append(f"Classes: {listed(offer['classes'])}")
        if "image" in offer["kinds"]:
            lines.append("Or send a photo, with a caption that says what to make of it.")
        if "tune" in offer["kinds"]:
            lines.append("For a style of your own send pictures, an album say, with the caption /tune NAME WHAT-IT-IS.")
        await message.answer("\n".join(lines))

    async def draw_class(self, message: Message, command: CommandObject) -> None:
        words = (command.args or "").split()
        n = int(words.pop()) if len(words) > 1 and words[-1].isdecimal() and len(words[-1]) < 5 else 1
        name = "_".join(words).lower()
        await self._submit(message, ClassRequest(class_name=name, n=n, seed=_seed(message)))

    async def draw_text(self, message: Message, command: CommandObject) -> None:
        await self._draw_prompt(message, command.args or "")

    async def draw_plain_text(self, message: Message) -> None:
        if "text" not in (await asyncio.to_thread(self.queue.offer))["kinds"]:
            return await self.help(message)
        return await self._draw_prompt(message, message.text)

    async def draw_sticker(self, message: Message, bot: Bot) -> None:
        if not (message.photo or message.document):
            raise UserError("send me a photo, with /sticker as its caption, or with none")
        await self.draw_from_picture(message, bot)

    async def draw_from_picture(self, message: Message, bot: Bot) -> None:
        is_first = message.media_group_id not in self._captions
        caption = self._caption(message)
        kinds = (await asyncio.to_thread(self.queue.offer))["kinds"]
        # A picture alone becomes a sticker, those of an album are kept; where one is not offered, the other.
        album_is_kept = message.media_group_id is not None and "tune" in kinds
        keeps = not caption and (album_is_kept or "sticker" not in kinds)
        if keeps and "tune" not in kinds:
            raise UserError("what shall I make of it? Send the picture with a caption that says so")
        upload = await self._keep(message, bot)
        if keeps:
            if is_first:  # of an album
                await message.answer("I keep it for /tune. To make something of it now, send it with a caption.")
            return
        user = user_of(message)
        style = await asyncio.to_thread(self.queue.style_of, user)
        values = {"upload": upload, "style": style, "seed": _seed(message)}
        sticker = STICKER.fullmatch(caption)
        if sticker is None:
            request = ImageRequest(prompt=caption, **values)
        else:
            request = StickerRequest(prompt=sticker[1] or "", **values)
        await self._submit(message, request)

    async def style(self, message: Message, command: CommandObject) -> None:
        user, chosen = user_of(message), (command.args or "").strip()
        if chosen:
            await asyncio.to_thread(self.queue.choose_style, user, None if chosen == "none" else chosen)
        present = await asyncio.to_thread(self.queue.style_of, user)
        styles = (await asyncio.to_thread(self.queue.offer, user))["styles"]
        choice = f"Choose with /style NAME: {', '.join([*styles, 'none'])}" if styles else "There are no others."
        await message.answer(f"Your style: {present or 'none'}. {choice}")

    async def tune(self, message: Message, command: CommandObject, bot: Bot) -> Awaitable[None] | None:
        """Learn a style from the pictures that were sent before, with this as their caption, or in its album."""
        name, _, class_name = map(str.strip, (command.args or "").strip().partition(" "))
        if not class_name:
            raise UserError("which name shall the style have, and what do the pictures show? For one: /tune rex dog")
        if message.photo or message.document:
            await self._keep(message, bot)
        learning = answer_mistakes(lambda *_: self._learn(message, name, class_name), message, {})
        album = message.media_group_id
        if album is None:
            return await learning
        self._captions[album] = ""  # so that its other pictures are kept
        return learning  # for when they have come

    async def _learn(self, message: Message, name: str, class_name: str) -> None:
        unused = await asyncio.to_thread(self.queue.unused_uploads, user_of(message))
        newest = tuple(unused[-self.queue.config.limits.tune_pictures :])
        await self._submit(message, TuneRequest(name=name, class_name=class_name, uploads=newest, seed=_seed(message)))

    async def forget(self, message: Message, command: CommandObject) -> None:
        name = (command.args or "").strip()
        await asyncio.to_thread(self.queue.forget_style, user_of(message), name)
        await message.answer(f"The style {name} is gone.")

    async def status(self, message: Message) -> None:
        mine = await asyncio.to_thread(self.queue.jobs_of, user_of(message), UNFINISHED)
        tickets = [await asyncio.to_thread(self.queue.ticket, job.id) for job in mine]
        lines = [f"{describe(ticket.job.request)}: {answer_of(ticket)}" for ticket in tickets]
        await message.answer("\n".join(lines) or "Nothing of yours is under way.")

    async def cancel(self, message: Message) -> None:
        mine = await asyncio.to_thread(self.queue.jobs_of, user_of(message), UNFINISHED)
        count = sum([await asyncio.to_thread(self.queue.cancel, job.id, job.user) for job in mine])
        await message.answer(f"{count} cancelled." if count else "There is nothing to cancel.")

    async def press_cancel(self, press: CallbackQuery) -> None:
        job_id = press.data.removeprefix(CANCEL)
        done = await asyncio.to_thread(self.queue.cancel, job_id, user_of(press))
        await press.answer("Cancelled." if done else "There is nothing to cancel.")

    async def result(self, message: Message) -> None:
        count = await self.courier.send_unsure(user_of(message))
        if not count:
            await message.answer("Everything that is done was sent. /status shows what is under way.")

    async def delete_me(self, message: Message) -> None:
        count = await asyncio.to_thread(self.queue.purge, user_of(message))
        await message.answer(f"Everything that was kept of you is gone, {count} jobs with their pictures among it.")

    async def _draw_prompt(self, message: Message, prompt: str) -> None:
        style = await asyncio.to_thread(self.queue.style_of, user_of(message))
        await self._submit(message, TextRequest(prompt=prompt.strip(), style=style, seed=_seed(message)))

    async def _submit(self, message: Message, request: Request) -> None:
        """Queue a job whose id follows from its message, and answer with its place."""
        job_id = _job_id(message)
        origin = {"chat": message.chat.id, "asked": message.message_id}
        ticket = await asyncio.to_thread(self.queue.submit, user_of(message), request, job_id, origin)
        if "answer" in ticket.job.origin:
            return
        answer = await message.answer(answer_of(ticket), reply_markup=cancel_button(job_id))
        await asyncio.to_thread(self.queue.set_origin, job_id, {**origin, "answer": answer.message_id})

    async def _keep(self, message: Message, bot: Bot) -> str:
        """Keep a message's picture; returns the name of the upload."""
        file = message.document or message.photo[-1]  # the largest of its sizes
        require_size(file.file_size or 0, self.queue.config.limits.photo)
        data = io.BytesIO()
        await bot.download(file, destination=data)
        return await asyncio.to_thread(keep_upload, self.queue, user_of(message), data.getvalue())

    def _caption(self, message: Message) -> str:
        """That of the picture, or of the album that it is in."""
        album = message.media_group_id
        caption = (message.caption or "").strip()
        if album is None:
            return caption
        while len(self._captions) >= ALBUMS:
            del self._captions[next(iter(self._captions))]
        if caption or album not in self._captions:  # any picture of an album may have it
            self._captions[album] = caption
        return self._captions[album]


async def answer_mistakes(
    handler: Callable[[TelegramObject, dict[str, Any]], Awaitable[Any]],
    event: Message | CallbackQuery,
    data: dict[str, Any],
) -> Any:
    """What a user did wrong, or cannot have now, is an answer."""
    try:
        return await handler(event, data)
    except UserError as error:
        most = MOST_OF_A_MESSAGE if isinstance(event, Message) else MOST_OF_A_NOTICE
        return await event.answer(textwrap.shorten(f"{error}.", most, placeholder="..."))
    except Exception:
        log.exception("%s of %s failed", type(event).__name__, event.from_user.id)
        return await event.answer("Something went wrong here. Please try again later.")


def _job_id(message: Message) -> str:
    return f"telegram-{message.chat.id}-{message.message_id}"


def _seed(message: Message) -> int:
    """Another for every message, the same for the same."""
    return zlib.crc32(_job_id(message).encode())
