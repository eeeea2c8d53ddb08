"""The buttons under a sticker: into a pack of the user's on Telegram, out of it again, and a copy as a file."""

from __future__ import annotations

import asyncio
import contextlib

from aiogram import Bot, F, Router
from aiogram.exceptions import TelegramAPIError, TelegramBadRequest, TelegramRetryAfter
from aiogram.types import CallbackQuery, FSInputFile, InputSticker, Sticker

from improved_diffusion.errors import UserError
from improved_diffusion.serving.bot.conversation import answer_mistakes, user_of
from improved_diffusion.serving.bot.courier import ADD, COPY, REFUSALS, UNDO, sticker_buttons
from improved_diffusion.serving.ledger import PackEntry, PackLedger
from improved_diffusion.serving.queue import JobQueue

LARGEST = 120  # stickers of a pack
TITLE = "My stickers"
EMOJI = "\N{ARTIST PALETTE}"  # each sticker has to stand for one
TRIES = 50  # numbers, of packs that are full, or whose names Telegram does not give away
NO_PACK = "STICKERSET_INVALID"
NOT_HERE = ("already occupied", "STICKERS_TOO_MUCH", NO_PACK)  # it may go into the next pack
UNKNOWN = ""  # Telegram's name of a sticker that was added, but not shown in its pack at once


def pack_buttons(queue: JobQueue, bot: Bot) -> Router:
    """All handlers. Each may be called twice for a press, and then changes nothing more."""
    return _Packs(queue, bot).router


class _Packs:
    def __init__(self, queue: JobQueue, bot: Bot):
        self.queue = queue
        self.bot = bot
        self.ledger = PackLedger(queue.engine)
        self.router = router = Router()
        router.callback_query.outer_middleware(answer_mistakes)
        router.callback_query(F.data.startswith(ADD))(self.add)
        router.callback_query(F.data.startswith(UNDO))(self.undo)
        router.callback_query(F.data.startswith(COPY))(self.copy)

    async def add(self, press: CallbackQuery) -> None:
        job_id = press.data.removeprefix(ADD)
        entry = await asyncio.to_thread(self.ledger.find, job_id, user_of(press))
        if entry is None or (entry.sticker is None and not await self._has_arrived(press, entry)):
            entry = await self._add(press, job_id)
        pack = await self._pack(press, entry.number)
        await self._show(press, job_id, f"https://t.me/addstickers/{pack}")
        await press.answer("It is in your pack.")

    async def undo(self, press: CallbackQuery) -> None:
        job_id = press.data.removeprefix(UNDO)
        entry = await asyncio.to_thread(self.ledger.find, job_id, user_of(press))
        if entry is not None:
            if entry.sticker == UNKNOWN:
                raise UserError("I cannot tell it from the others in your pack: take it out there, with @Stickers")
            present = await self._stickers(await self._pack(press, entry.number)) or []
            for sticker in present:
                if sticker.file_unique_id == entry.sticker:
                    await self.bot.delete_sticker_from_set(sticker.file_id)
            await asyncio.to_thread(self.ledger.forget, job_id)
        await self._show(press, job_id, None)
        await press.answer("It is out of your pack.")

    async def copy(self, press: CallbackQuery) -> None:
        file = await self._file(press, press.data.removeprefix(COPY))
        # Else Telegram would make a sticker of it again.
        await self.bot.send_document(press.message.chat.id, file, disable_content_type_detection=True)
        await press.answer()

    async def _add(self, press: CallbackQuery, job_id: str) -> PackEntry:
        """Put a sticker into the user's latest pack, or the next that has room; into a new one, where there is none."""
        user, owner = user_of(press), press.from_user.id
        file = await self._file(press, job_id)
        sticker = InputSticker(sticker=file, format="static", emoji_list=[EMOJI])
        latest = await asyncio.to_thread(self.ledger.latest, user)
        for number in range(latest, latest + TRIES):
            pack = await self._pack(press, number)
            present = await self._stickers(pack)
            if present is not None and len(present) >= LARGEST:
                continue
            entry = PackEntry(job_id, number, tuple(one.file_unique_id for one in present or ()), None)
            await asyncio.to_thread(self.ledger.begin, user, entry)
            try:
                if present is None:
                    await self.bot.create_new_sticker_set(owner, pack, f"{TITLE} {number}", [sticker])
                else:
                    await self.bot.add_sticker_to_set(owner, pack, sticker)
            except (*REFUSALS, TelegramRetryAfter) as error:
                await asyncio.to_thread(self.ledger.forget, job_id)
                if not any(reason in error.message for reason in NOT_HERE):
                    raise UserError(_explained(error)) from error
            except TelegramAPIError as error:  # the connection broke: who knows whether before or after
                raise UserError("Telegram does not answer: press again, and I look whether it arrived") from error
            else:
                if not await self._has_arrived(press, entry):
                    await asyncio.to_thread(self.ledger.confirm, job_id, UNKNOWN)
                return entry
        raise UserError(f"your packs are full, {TRIES} of them")

    async def _has_arrived(self, press: CallbackQuery, entry: PackEntry) -> bool:
        """Look for a sticker in the pack that it was to be added to, and note it if it is there."""
        present = await self._stickers(await self._pack(press, entry.number)) or []
        known = {*entry.before, *await asyncio.to_thread(self.ledger.stickers, user_of(press))}
        new = [one.file_unique_id for one in present if one.file_unique_id not in known]
        if new:
            await asyncio.to_thread(self.ledger.confirm, entry.job, new[0])
        return bool(new)

    async def _stickers(self, pack: str) -> list[Sticker] | None:
        """What is in a pack; None where there is no such, as when its user has deleted it."""
        try:
            return (await self.bot.get_sticker_set(pack)).stickers
        except TelegramBadRequest as error:
            if NO_PACK not in error.message:
                raise
            return None

    async def _pack(self, press: CallbackQuery, number: int) -> str:
        """The name of a user's pack, in the form that Telegram wants."""
        return f"u{press.from_user.id}_{number}_by_{(await self.bot.me()).username}"

    async def _file(self, press: CallbackQuery, job_id: str) -> FSInputFile:
        mine = await asyncio.to_thread(self.queue.jobs_of, user_of(press), ["done"])
        files = [file for job in mine if job.id == job_id for file in self.queue.files(job) if file.is_file()]
        if not files:
            raise UserError("this sticker is no longer kept: send the photo again")
        return FSInputFile(files[0], f"sticker{files[0].suffix}")

    async def _show(self, press: CallbackQuery, job_id: str, pack: str | None) -> None:
        """Change the buttons under a sticker."""
        where = {"chat_id": press.message.chat.id, "message_id": press.message.message_id}
        with contextlib.suppress(TelegramBadRequest):  # they are as they should be, or gone
            await self.bot.edit_message_reply_markup(**where, reply_markup=sticker_buttons(job_id, pack))


def _explained(error: TelegramAPIError) -> str:
    if "PEER_ID_INVALID" in error.message:
        return "I may make packs only for who has started me: open a chat with me, press Start, and then here again"
    return f"Telegram has refused it: {error.message.removeprefix('Bad Request: ')}"
