"""Pictures from people, who send anything: judged before they are decoded, and drawn anew from their pixels."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from improved_diffusion.data.decode import to_rgb
from improved_diffusion.errors import UserError
from improved_diffusion.settings import require

FORMATS = ("JPEG", "PNG", "WEBP")  # by content, whatever a file is called
SHORTEST, LONGEST_RATIO = 16, 8.0  # side in pixels, and of the longer side to the shorter
MOST_SCANS = 50  # of a progressive JPEG, each of which is as much work as a whole picture; cameras and tools make 10


@dataclass(frozen=True)
class PhotoLimits:
    """What is taken."""

    nbytes: int  # of a file
    pixels: int  # width times height
    side: int  # pixels of the longer side to which a picture is reduced
    formats: tuple[str, ...] = FORMATS  # in Pillow's names


def require_size(size: int, limits: PhotoLimits) -> None:
    """Raise UserError where a file is of too many bytes, which is best asked before it is fetched."""
    require(size <= limits.nbytes, f"the file has {size / 1e6:.0f} MB, more than {limits.nbytes / 1e6:.0f}")


def clean(data: bytes, limits: PhotoLimits, convert: Callable[[Image.Image], Image.Image] = to_rgb) -> Image.Image:
    """The picture in the content of a file, upright, of bounded size, and nothing else of the file.

    Args:
        data: the content.
        limits: what is taken.
        convert: to the wanted mode; by default RGB, transparency on white.

    Raises:
        UserError: another kind of file, or one that is damaged, animated, too large or too narrow.
    """
    require_size(len(data), limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=limits.formats) as image:
                _require_usable(image, data, limits)
                image.draft("RGB", (limits.side, limits.side))  # a JPEG may be decoded smaller
                upright = convert(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError("this is no picture that can be read here: send a JPEG, PNG or WebP") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(_too_many_pixels(limits)) from None
    except Exception as error:  # Pillow raises almost anything for a damaged file
        raise UserError("the picture is damaged: save it again, and send that") from error
    upright.thumbnail((limits.side, limits.side), Image.Resampling.LANCZOS)
    return Image.fromarray(np.asarray(upright))  # without what Pillow remembers of the file, and would write


def _require_usable(image: Image.Image, data: bytes, limits: PhotoLimits) -> None:
    """Judge by the header, before any pixel is decoded."""
    width, height = image.size
    require(width * height <= limits.pixels, _too_many_pixels(limits))
    require(min(width, height) >= SHORTEST, f"the picture is {width} x {height}: it takes {SHORTEST} pixels a side")
    require(
        max(width, height) <= LONGEST_RATIO * min(width, height),
        f"the picture is {width} x {height}, too narrow: its sides may differ by a factor of {LONGEST_RATIO:g}",
    )
    # MPO is a JPEG with more pictures behind it, previews or depth, as cameras and telephones write it.
    is_jpeg = image.format in ("JPEG", "MPO")
    require(is_jpeg or getattr(image, "n_frames", 1) == 1, "the picture is animated: send a still one")
    scans = len(re.findall(rb"\xff\xda", data)) if is_jpeg else 1
    require(scans <= MOST_SCANS, f"the picture has {scans} scans: save it again as a plain JPEG")


def _too_many_pixels(limits: PhotoLimits) -> str:
    return f"the picture has more than {limits.pixels / 1e6:.0f} million pixels: send a smaller one"
