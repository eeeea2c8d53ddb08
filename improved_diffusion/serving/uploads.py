"""Pictures that users send. What is kept is drawn anew from the pixels: upright, without metadata, of bounded size."""

from __future__ import annotations

import hashlib
import io
import re
import time
import warnings

import numpy as np
import sqlalchemy as sa
from PIL import Image, ImageOps, UnidentifiedImageError

from improved_diffusion.data.decode import to_rgb
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.serving.config import LimitsConfig
from improved_diffusion.serving.database import put, uploads
from improved_diffusion.serving.queue import Busy, JobQueue, require_disk
from improved_diffusion.settings import require

FORMATS = ("JPEG", "PNG", "WEBP")  # by content, whatever a file is called
SHORTEST, LONGEST_RATIO = 16, 8.0  # side in pixels, and of the longer side to the shorter
MOST_SCANS = 50  # of a progressive JPEG, each of which is as much work as a whole picture; cameras and tools make 10


def keep_upload(queue: JobQueue, user: str, data: bytes) -> str:
    """Keep the picture in the content of a file that a user sent; returns the name under which requests know it.

    Raises:
        UserError: it is no picture that can be used; the message says why, to the user.
        Busy: the disk is full, or the user's part of it.
    """
    limits = queue.config.limits
    picture = clean(data, limits)
    name = hashlib.sha256(user.encode() + b"\0" + data).hexdigest()[:32]  # the same again is the same
    with queue.engine.connect() as connection:
        require_disk(connection, queue.config)
        others = sa.select(sa.func.count()).where(uploads.c.user == user, uploads.c.id != name)
        if connection.scalar(others) >= limits.uploads_per_user:
            raise Busy(f"you have sent {limits.uploads_per_user} pictures: try again in {limits.uploads_hours:g} hours")
    file = queue.config.uploads / name
    with atomic_write(file) as temporary:
        picture.save(temporary, format="png")
    with queue.engine.begin() as connection:
        put(connection, uploads, name, user=user, bytes=file.stat().st_size, created=time.time())
    return name


def require_size(size: int, limits: LimitsConfig) -> None:
    """Raise UserError where a file is of too many bytes, which is best asked before it is fetched."""
    require(size <= limits.upload_bytes, f"the file has {size / 1e6:.0f} MB, more than {limits.upload_bytes / 1e6:.0f}")


def clean(data: bytes, limits: LimitsConfig) -> Image.Image:
    """The picture in the content of a file, RGB, transparency on white, nothing else of the file.

    Raises:
        UserError: another kind of file, or one that is damaged, animated, too large or too narrow.
    """
    require_size(len(data), limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _require_usable(image, data, limits)
                image.draft("RGB", (limits.upload_side, limits.upload_side))  # a JPEG may be decoded smaller
                upright = to_rgb(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError("this is no picture that can be read here: send a JPEG, PNG or WebP") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(_too_many_pixels(limits)) from None
    except Exception as error:  # Pillow raises almost anything for a damaged file
        raise UserError("the picture is damaged: save it again, and send that") from error
    upright.thumbnail((limits.upload_side, limits.upload_side), Image.Resampling.LANCZOS)
    return Image.fromarray(np.asarray(upright))  # without what Pillow remembers of the file, and would write


def _require_usable(image: Image.Image, data: bytes, limits: LimitsConfig) -> None:
    """Judge by the header, before any pixel is decoded."""
    width, height = image.size
    require(width * height <= limits.upload_pixels, _too_many_pixels(limits))
    require(min(width, height) >= SHORTEST, f"the picture is {width} x {height}: it takes {SHORTEST} pixels a side")
    require(
        max(width, height) <= LONGEST_RATIO * min(width, height),
        f"the picture is {width} x {height}, too narrow: its sides may differ by a factor of {LONGEST_RATIO:g}",
    )
    require(getattr(image, "n_frames", 1) == 1, "the picture is animated: send a still one")
    scans = len(re.findall(rb"\xff\xda", data)) if image.format == "JPEG" else 1
    require(scans <= MOST_SCANS, f"the picture has {scans} scans: save it again as a plain JPEG")


def _too_many_pixels(limits: LimitsConfig) -> str:
    return f"the picture has more than {limits.upload_pixels / 1e6:.0f} million pixels: send a smaller one"
