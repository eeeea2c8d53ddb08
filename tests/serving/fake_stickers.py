"""Sets of stickers, as Telegram keeps them and refuses what is wrong with them; part of `FakeTelegram`."""

from __future__ import annotations

import io
import itertools
import json
import re
from typing import Any

from PIL import Image

LARGEST = 120
INVALID = "STICKERSET_INVALID"


class Refused(Exception):
    """With an answer of status 400."""


class StickerSets:
    def __init__(self) -> None:
        self.sets: dict[str, list[str]] = {}  # {name: the stickers in it}
        self.reserved: set[str] = set()  # names that are taken, of sets that nobody can open
        self.strangers: set[str] = set()  # users who have never started the bot
        self.content: dict[str, bytes] = {}
        self._numbers = itertools.count(1)

    def knows(self, method: str) -> bool:
        return hasattr(self, f"_{method}")

    def answer(self, method: str, values: dict[str, str], files: dict[str, bytes]) -> Any:
        """Raises Refused."""
        return getattr(self, f"_{method}")(values, files)

    def fill(self, name: str, count: int = LARGEST) -> None:
        self.sets[name] = [f"old{next(self._numbers)}" for _ in range(count)]

    def _createNewStickerSet(self, values: dict[str, str], files: dict[str, bytes]) -> bool:  # noqa: N802
        name = values["name"]
        if values["user_id"] in self.strangers:
            raise Refused("PEER_ID_INVALID")
        if not re.fullmatch(r"[A-Za-z](?:_?[A-Za-z0-9])*_by_fake_bot", name) or len(name) > 64:
            raise Refused("invalid sticker set name is specified")
        if name in self.sets or name in self.reserved:
            raise Refused("sticker set name is already occupied")
        if not 1 <= len(values["title"]) <= 64:
            raise Refused("STICKERSET_TITLE_INVALID")
        self.sets[name] = [self._received(one, files) for one in json.loads(values["stickers"])]
        return True

    def _addStickerToSet(self, values: dict[str, str], files: dict[str, bytes]) -> bool:  # noqa: N802
        present = self._open(values["name"])
        if len(present) >= LARGEST:
            raise Refused("STICKERS_TOO_MUCH")
        present.append(self._received(json.loads(values["sticker"]), files))
        return True

    def _getStickerSet(self, values: dict[str, str], _: object) -> dict[str, Any]:  # noqa: N802
        stickers = [
            {"file_id": f"file-{name}", "file_unique_id": name, "type": "regular", "width": 512, "height": 512}
            | {"is_animated": False, "is_video": False}
            for name in self._open(values["name"])
        ]
        return {"name": values["name"], "title": "x", "sticker_type": "regular", "stickers": stickers}

    def _deleteStickerFromSet(self, values: dict[str, str], _: object) -> bool:  # noqa: N802
        name = values["sticker"].removeprefix("file-")
        for present in self.sets.values():
            if name in present:
                present.remove(name)
                return True
        raise Refused("STICKER_INVALID")

    def _open(self, name: str) -> list[str]:
        if name not in self.sets:
            raise Refused(INVALID)
        return self.sets[name]

    def _received(self, sticker: dict[str, Any], files: dict[str, bytes]) -> str:
        content = files[sticker["sticker"].removeprefix("attach://")]
        with Image.open(io.BytesIO(content)) as image:
            if image.format not in ("PNG", "WEBP") or max(image.size) != 512 or len(content) > 512_000:
                raise Refused("STICKER_PNG_DIMENSIONS")
        if sticker["format"] != "static" or not sticker["emoji_list"]:
            raise Refused("STICKER_EMOJI_INVALID")
        name = f"sticker{next(self._numbers)}"
        self.content[name] = content
        return name
