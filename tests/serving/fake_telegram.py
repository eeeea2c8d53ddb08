"""A Bot API server of our own, over HTTP: what Telegram does, as far as the bot needs it, and what it may do wrong."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.serving.fake_stickers import Refused, StickerSets

TOKEN = "123456:AAFakeTokenOfTests"
BOT = {"id": 123456, "is_bot": True, "first_name": "Fake", "username": "fake_bot"}


@dataclass
class Call:
    """One that the bot made."""

    method: str
    values: dict[str, Any]
    files: list[bytes] = field(default_factory=list)
    result: Any = None


class FakeTelegram:
    """Serves from a thread of its own. Tests are the users: they send, and look at the calls."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.stickers = StickerSets()
        self.refuse: Callable[[Call], tuple[int, dict[str, Any]] | None] = lambda call: None
        self.is_away = False  # and a gateway says so
        self.break_off: Callable[[Call], bool] = lambda call: False
        self._updates: list[dict[str, Any]] = []
        self._files: dict[str, bytes] = {}
        self._messages = 1000
        self._numbers = itertools.count(1)
        self._presses = itertools.count(1)
        self._closing = False
        self._started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._started.wait(10)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._closing = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    # What users do.

    def say(self, text: str | None = None, user: int = 7, **more: Any) -> int:
        """A message of a user, in the chat with the bot; returns its number."""
        self._messages += 1
        person = {"id": user, "is_bot": False, "first_name": f"User {user}"}
        message = {"message_id": self._messages, "date": int(time.time()), "from": person}
        message |= {"chat": {"id": user, "type": "private", "first_name": person["first_name"]}, **more}
        if text is not None:
            message["text"] = text
            if text.startswith("/"):
                message["entities"] = [{"type": "bot_command", "offset": 0, "length": len(text.split()[0])}]
        self._add(message=message)
        return message["message_id"]

    def send_file(
        self, data: bytes, caption: str | None = None, user: int = 7, photo: bool = False, **more: Any
    ) -> int:
        """A picture or a file, of whatever content."""
        name = f"file{len(self._files)}"
        self._files[name] = data
        file = {"file_id": name, "file_unique_id": name, "file_size": len(data)}
        what = (
            {"photo": [{**file, "width": 90, "height": 60}]} if photo else {"document": {**file, "file_name": "a.png"}}
        )
        return self.say(user=user, **what, **({} if caption is None else {"caption": caption}), **more)

    def press(self, call: Call, user: int = 7, button: str | None = None) -> str:
        """Press a button under a message of the bot's, by default the first. Returns what the answer will refer to."""
        person = {"id": user, "is_bot": False, "first_name": f"User {user}"}
        message = {"message_id": call.values["message_id"], "date": 1, "chat": {"id": user, "type": "private"}}
        buttons = [one for row in json.loads(call.values["reply_markup"])["inline_keyboard"] for one in row]
        data = next(one["callback_data"] for one in buttons if button in (None, one["text"]))
        name = f"press {next(self._presses)}"
        self._add(callback_query={"id": name, "from": person, "chat_instance": "1", "data": data, "message": message})
        return name

    # What they see.

    def texts(self, user: int = 7) -> list[str]:
        """The messages of the bot's to a user."""
        return [call.values["text"] for call in self.of("sendMessage", user)]

    def of(self, method: str, user: int = 7) -> list[Call]:
        return [call for call in self.calls if call.method == method and call.values.get("chat_id") == str(user)]

    def pictures(self, user: int = 7) -> list[bytes]:
        """What was sent to a user."""
        return [
            file for method in ("sendPhoto", "sendMediaGroup") for call in self.of(method, user) for file in call.files
        ]

    @property
    def unacknowledged(self) -> int:
        return len(self._updates)

    def _add(self, **update: Any) -> None:
        numbered = {"update_id": next(self._numbers), **update}
        # The list is looked up by the loop: a poll may have put another in its place by then.
        self._loop.call_soon_threadsafe(lambda: self._updates.append(numbered))

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        application = web.Application(client_max_size=100_000_000)
        application.router.add_post(f"/bot{TOKEN}/{{method}}", self._answer)
        application.router.add_get(f"/file/bot{TOKEN}/{{name}}", self._file)
        application.router.add_post("/{anything:.*}", self._unknown)
        runner = web.AppRunner(application, shutdown_timeout=0)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.port = runner.addresses[0][1]
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())

    async def _unknown(self, _: web.Request) -> web.Response:
        return _error(401, "Unauthorized")

    async def _file(self, request: web.Request) -> web.Response:
        return web.Response(body=self._files[request.match_info["name"]])

    async def _answer(self, request: web.Request) -> web.Response:
        if self.is_away:
            return web.Response(status=502, text="<html>502 Bad Gateway</html>", content_type="text/html")
        call, attached = Call(request.match_info["method"], {}), {}
        for name, value in (await request.post()).items():
            if isinstance(value, web.FileField):
                attached[name] = value.file.read()
                call.files.append(attached[name])
            else:
                call.values[name] = value
        if call.method == "getUpdates":
            return _result(await self._wait_for_updates(call.values))
        refusal = self.refuse(call)
        if refusal is not None:
            return _error(*refusal)
        breaks = self.break_off(call)
        if call.method.startswith("send"):
            self._messages += 1
            call.values["message_id"] = self._messages
        if self.stickers.knows(call.method):
            try:
                call.result = self.stickers.answer(call.method, call.values, attached)
            except Refused as reason:
                return _error(400, f"Bad Request: {reason}")
        self.calls.append(call)
        if breaks:  # it was done, but nobody is told so
            request.transport.abort()
        return _result(self._result_of(call))

    async def _wait_for_updates(self, values: dict[str, str]) -> list[dict[str, Any]]:
        self._updates = [update for update in self._updates if update["update_id"] >= int(values.get("offset", 0))]
        deadline = time.monotonic() + float(values.get("timeout", 0))
        while not self._updates and time.monotonic() < deadline and not self._closing:
            await asyncio.sleep(0.02)
        return self._updates[:100]

    def _result_of(self, call: Call) -> Any:
        if call.method == "getMe":
            return BOT
        if call.result is not None:
            return call.result
        if call.method == "getFile":
            name = call.values["file_id"]
            return {"file_id": name, "file_unique_id": name, "file_path": name}
        if call.method in ("setMyCommands", "answerCallbackQuery"):
            return True
        chat = {"id": int(call.values["chat_id"]), "type": "private"}
        number = int(call.values["message_id"])
        message = {"message_id": number, "date": 1, "chat": chat, "from": BOT, "text": call.values.get("text", "")}
        return [message] * len(call.files) if call.method == "sendMediaGroup" else message


def _result(value: Any) -> web.Response:
    return web.json_response({"ok": True, "result": value})


def _error(code: int, description: str | dict[str, Any]) -> web.Response:
    more = description if isinstance(description, dict) else {"description": description}
    return web.json_response({"ok": False, "error_code": code, "description": "", **more}, status=code)
