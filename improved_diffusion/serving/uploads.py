"""Pictures that users send, as they are kept: see data/photo.py."""

from __future__ import annotations

import hashlib
import threading
import time

import sqlalchemy as sa
from PIL import Image

from improved_diffusion.data.photo import clean
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.serving.config import ServingConfig
from improved_diffusion.serving.database import put, uploads
from improved_diffusion.serving.queue import Busy, JobQueue, require_disk

DECODING = threading.Semaphore(2)  # at once: a file of 100 KB may take 600 MB


def keep_upload(queue: JobQueue, user: str, data: bytes) -> str:
    """Keep the picture in the content of a file that a user sent; returns the name under which requests know it.

    Raises:
        UserError: it is no picture that can be used; the message says why, to the user.
        Busy: the disk is full, or the user's part of it.
    """
    limits = queue.config.limits
    with DECODING:
        picture = clean(data, limits.photo)
    name = hashlib.sha256(user.encode() + b"\0" + data).hexdigest()[:32]  # the same again is the same
    with queue.engine.connect() as connection:
        require_disk(connection, queue.config)
        others = sa.select(sa.func.count()).where(uploads.c.user == user, uploads.c.id != name)
        if connection.scalar(others) >= limits.uploads_per_user:
            raise Busy(f"you have sent {limits.uploads_per_user} pictures: try again in {limits.uploads_hours:g} hours")
    with queue.engine.begin() as connection:  # it does not expire while its file is written anew
        connection.execute(uploads.update().where(uploads.c.id == name).values(created=time.time()))
    file = queue.config.uploads / name
    with atomic_write(file) as temporary:
        picture.save(temporary, format="png")
    with queue.engine.begin() as connection:
        put(connection, uploads, name, user=user, bytes=file.stat().st_size, created=time.time())
    return name


def open_upload(config: ServingConfig, name: str) -> Image.Image:
    """A kept picture, RGB. Raises UserError where it has gone."""
    try:
        with Image.open(config.uploads / name, formats=("PNG",)) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError("the picture to start from is gone: send it again") from None
