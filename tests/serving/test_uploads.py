"""What people send: each file is used, or refused in one clear answer, and what is kept is pixels alone."""

from __future__ import annotations

import contextlib
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, PngImagePlugin

from improved_diffusion.data.photo import clean
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.serving.config import LimitsConfig
from improved_diffusion.serving.database import uploads
from improved_diffusion.serving.queue import Busy
from improved_diffusion.serving.upkeep import remove_expired
from improved_diffusion.serving.uploads import keep_upload, open_upload

LIMITS = LimitsConfig(upload_bytes=300_000, upload_pixels=1_000_000, upload_side=256)
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8)).resize((120, 80))


def encoded(image: Image.Image, kind: str = "png", **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width: int, height: int, rows: bytes, *more: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more) + pixels + chunk(b"IEND", b"")


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("payload.py", "print('hello')")
    return file.getvalue()


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "green")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def with_place() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    exif[0x010F] = "MAKER OF CAMERAS"
    exif.get_ifd(0x8825)[2] = (52.0, 31.0, 12.0)  # latitude
    return encoded(PHOTO, "jpeg", exif=exif)


def with_text() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "my address")
    return encoded(PHOTO, pnginfo=text, icc_profile=b"my profile" * 20)


def scans(count: int) -> bytes:
    """A progressive JPEG with its last scan over and over."""
    data = encoded(PHOTO, "jpeg", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + b"\xff\xd9"


def disc() -> bytes:
    """A photo of a dark disc on white."""
    picture = Image.new("RGB", (120, 80), "white")
    ImageDraw.Draw(picture).ellipse((20, 10, 60, 50), fill=(120, 0, 20))
    return encoded(picture, "jpeg")


JPEG, PNG, WEBP = encoded(PHOTO, "jpeg"), encoded(PHOTO), encoded(PHOTO, "webp")
REFUSED = {
    "nothing": (b"", "no picture"),
    "text": (b"hello, world", "no picture"),
    "a script": (b"#!/bin/sh\nrm -rf /\n", "no picture"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="99" height="99"/>', "no picture"),
    "a page": (b"<html><script>alert(1)</script></html>", "no picture"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n(x) run\n", "no picture"),
    "a PDF": (encoded(PHOTO, "pdf"), "no picture"),
    "an archive": (zipped(), "no picture"),
    "a program": (b"\x7fELF" + bytes(200), "no picture"),
    "a still GIF": (encoded(PHOTO, "gif"), "no picture"),
    "an animated GIF": (animation("gif"), "no picture"),
    "TIFF": (encoded(PHOTO, "tiff"), "no picture"),
    "BMP": (encoded(PHOTO, "bmp"), "no picture"),
    "an icon": (encoded(PHOTO, "ico"), "no picture"),
    "a JPEG's first bytes": (JPEG[:3], "no picture"),
    "a PNG's first bytes": (PNG[:8], "no picture"),
    "noise behind a PNG's first bytes": (PNG[:8] + bytes(range(256)) * 4, "no picture|damaged"),
    "a JPEG cut short": (JPEG[: len(JPEG) // 2], "damaged"),
    "a PNG cut short": (PNG[: len(PNG) // 2], "damaged"),
    "a WebP cut short": (WEBP[: len(WEBP) // 2], "damaged|no picture"),
    "a PNG with damaged pixels": (PNG[:60] + bytes(20) + PNG[80:], "damaged"),
    "an animated WebP": (animation("webp"), "animated"),
    "an animated PNG": (animation("png"), "animated"),
    "1 x 10,000": (encoded(Image.new("RGB", (1, 10_000))), "1 x 10000"),
    "10,000 x 20": (encoded(Image.new("RGB", (10_000, 20))), "too narrow"),
    "a single pixel": (encoded(Image.new("RGB", (1, 1))), "takes 16 pixels"),
    "no pixels": (png_of(0, 0, b""), "no picture|damaged|takes 16"),
    "a bomb by its header": (png_of(60_000, 60_000, b"\0" * 100), "million pixels"),
    "a small bomb": (encoded(Image.new("1", (1200, 1200))), "1 million pixels"),
    "a WebP bomb": (encoded(Image.new("RGB", (1100, 1100)), "webp"), "million pixels"),
    "a JPEG bomb": (encoded(Image.new("L", (1500, 1500)), "jpeg"), "million pixels|MB"),
    "a bomb of text": (png_of(64, 64, b"", chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2_000_000)))), "damaged"),
    "a JPEG of scans": (scans(200), "scans"),
    "a JPEG of scans with a preview": (encoded(PHOTO, "mpo", save_all=True, append_images=[PHOTO] * 60), "scans"),
    "too many bytes": (PNG + bytes(300_000), "MB"),
}
USED = {
    "JPEG": JPEG,
    "PNG": PNG,
    "WebP": WEBP,
    "a progressive JPEG": scans(1),
    "a JPEG with a preview": encoded(PHOTO, "mpo", save_all=True, append_images=[PHOTO.resize((32, 32))]),
    "CMYK": encoded(PHOTO.convert("CMYK"), "jpeg"),
    "grey": encoded(PHOTO.convert("L"), "jpeg"),
    "black and white": encoded(PHOTO.convert("1")),
    "a palette": encoded(PHOTO.quantize(16)),
    "16 bits": encoded(Image.fromarray(np.full((80, 120), 40_000, np.uint16))),
    "grey with alpha": encoded(PHOTO.convert("LA")),
    "a JPEG that is an archive too": JPEG + zipped(),
    "a PNG that is a page too": PNG + b"<html><script>alert(1)</script></html>",
    "a comment": with_text(),
    "a place": with_place(),
    "a large photo": encoded(PHOTO.resize((900, 600)), "jpeg"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_in_a_clear_answer(name):
    data, answer = REFUSED[name]
    with pytest.raises(UserError, match=answer) as refusal:
        clean(data, LIMITS.photo)
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 120


@pytest.mark.parametrize("name", USED)
def test_what_is_kept_is_pixels_alone(name):
    kept = clean(USED[name], LIMITS.photo)
    assert kept.mode == "RGB"
    assert max(kept.size) <= LIMITS.upload_side
    again = Image.open(io.BytesIO(encoded(kept)))
    assert (again.info, dict(again.getexif())) == ({}, {})
    for secret in (b"MAKER", b"address", b"profile", b"script", b"payload"):
        assert secret not in encoded(kept)


def test_pictures_are_turned_upright():
    assert clean(with_place(), LIMITS.photo).size == (80, 120)


def test_transparency_is_shown_on_white():
    sticker = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(sticker).ellipse((16, 16, 48, 48), fill="red")
    kept = clean(encoded(sticker), LIMITS.photo)
    assert (kept.getpixel((0, 0)), kept.getpixel((32, 32))) == ((255, 255, 255), (255, 0, 0))


@given(st.binary(max_size=200), st.integers(0, 2000), st.sampled_from([JPEG, PNG, WEBP]))
def test_damage_is_never_more_than_an_answer(damage, place, whole):
    data = whole[: place % len(whole)] + damage + whole[place % len(whole) + len(damage) :]
    with contextlib.suppress(UserError):
        assert clean(data, LIMITS.photo).mode == "RGB"


def test_the_same_picture_is_kept_once(make_server, open_queue):
    queue = open_queue(make_server(uploads_per_user=1))
    names = {keep_upload(queue, user, PNG) for user in ("A", "A", "B")}
    assert len(names) == 2, "users share nothing"
    assert {file.name for file in queue.config.uploads.iterdir()} == names
    with pytest.raises(UserError):
        keep_upload(queue, "A", JPEG[:100])
    assert {file.name for file in queue.config.uploads.iterdir()} == names
    with pytest.raises(Busy, match="1 pictures"):
        keep_upload(queue, "A", JPEG)
    queue.purge("A")
    assert len(list(queue.config.uploads.iterdir())) == 1


def test_a_picture_does_not_expire_while_it_is_sent_again(make_server, open_queue, monkeypatch):
    queue = open_queue(make_server())
    name = keep_upload(queue, "A", encoded(PHOTO))
    with queue.engine.begin() as connection:
        connection.execute(uploads.update().values(created=0.0))

    @contextlib.contextmanager
    def writing_takes_long(file: Path) -> Iterator[Path]:
        with atomic_write(file) as temporary:
            yield temporary
        remove_expired(queue)

    monkeypatch.setattr("improved_diffusion.serving.uploads.atomic_write", writing_takes_long)
    assert keep_upload(queue, "A", encoded(PHOTO)) == name
    assert open_upload(queue.config, name).size == PHOTO.size
