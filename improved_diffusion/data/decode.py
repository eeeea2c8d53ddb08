"""One encoded image of any common kind -> one uint8 RGB square."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Told apart by content, not by file name; Pillow alone would open much more, EPS (through Ghostscript) for one.
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]
with contextlib.suppress(ImportError):  # of the extra `personalize`; reads what telephones write
    import pillow_heif

    pillow_heif.register_heif_opener()
    FORMATS.append("HEIF")
EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
    + (".heic", ".heif")
)
HEIF_TYPES = (b"ftypheic", b"ftypheix", b"ftypheim", b"ftypheis", b"ftypmif1", b"ftypmsf1")  # after 4 bytes of size
RESIZE_FILTER = "lanczos"

# A large image is first shrunk cheaply (in the JPEG's own DCT, then by box averages) to no less than this many times
# the target; at 3 the result differs from a full Lanczos resize by a fraction of a grey level.
REDUCING_GAP = 3.0


def open_encoded(data: bytes) -> Image.Image:
    """The image in the content of a file of one of FORMATS, not yet decoded.

    Raises:
        PIL.UnidentifiedImageError: another kind of file; or a HEIC photo, and what reads these is not installed.
    """
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        problem = "damaged, or not an image of a known format"  # Pillow's own message is an address in memory
        if data[4:12] in HEIF_TYPES and "HEIF" not in FORMATS:
            problem = "a HEIC photo: to read it pip install pillow-heif, or save it as JPEG"
        raise UnidentifiedImageError(problem) from None


def decode_upright(
    data: bytes, convert: Callable[[Image.Image], Image.Image] | None = None, at_least: int | None = None
) -> Image.Image:
    """The image in the content of a file, turned upright as its EXIF orientation says; of an animation the first frame.

    Args:
        data: the content.
        convert: to the wanted mode; by default `to_rgb`.
        at_least: a JPEG may be decoded smaller than it is, but with no side shorter than this.

    Raises whatever Pillow raises for a damaged, truncated or unsupported image, or one of more pixels than
    `PIL.Image.MAX_IMAGE_PIXELS` allows: OSError, ValueError, SyntaxError, struct.error, `DecompressionBombError` and
    others, so callers that must go on catch Exception.
    """
    with open_encoded(data) as image:
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        ImageOps.exif_transpose(image, in_place=True)
        return (convert or to_rgb)(image)


def decode_image(data: bytes, size: int) -> np.ndarray:
    """Decode as `decode_upright` does, crop the central square and resize it.

    Transparency is composited on white, colour profiles are ignored. The resize is Pillow's Lanczos, whose support
    grows with the reduction (antialiased; Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN
    Evaluation"): of Pillow's filters it keeps the most detail below the new Nyquist frequency. An image that is
    already `size` x `size` is not resampled.

    Returns uint8 RGB, shape (size, size, 3).
    """
    image = decode_upright(data, at_least=round(size * REDUCING_GAP))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP))


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Any Pillow mode -> RGB, transparent images composited on `background`, a colour that Pillow knows.

    Raises ValueError where the sample range is not defined.
    """
    if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow's own conversion to RGB clips instead of scaling
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point samples have no defined white level")
    if image.has_transparency_data:  # an alpha channel, or a transparent palette entry or colour
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    """Integer samples in 0..65535 -> uint8 in 0..255, rounded (65535 = 257 * 255)."""
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError("32-bit integer samples have no defined white level")
    return ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
