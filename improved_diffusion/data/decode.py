"""One encoded image of any common kind -> one uint8 array of a given size: grey, RGB or RGBA."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass

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


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Any Pillow mode -> RGB, transparent images composited on `background`, a colour that Pillow knows.

    Raises ValueError where the sample range is not defined.
    """
    image = _eight_bits(image)
    if image.has_transparency_data:  # an alpha channel, or a transparent palette entry or colour
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image.convert("RGB")


def to_rgba(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGBA, opaque where there is no transparency. Raises ValueError as `to_rgb` does."""
    return _eight_bits(image).convert("RGBA")


def to_grey(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> L, the luma of `to_rgb` (ITU-R 601-2). Raises ValueError as that does."""
    return to_rgb(image).convert("L")


CONVERSIONS = {1: to_grey, 3: to_rgb, 4: to_rgba}  # by the number of channels


def decode_upright(
    data: bytes, convert: Callable[[Image.Image], Image.Image] = to_rgb, at_least: int | None = None
) -> Image.Image:
    """The image in the content of a file, turned upright as its EXIF orientation says; of an animation the first frame.

    Args:
        data: the content.
        convert: to the wanted mode.
        at_least: a JPEG may be decoded smaller than it is, but with no side shorter than this.

    Raises whatever Pillow raises for a damaged, truncated or unsupported image, or one of more pixels than
    `PIL.Image.MAX_IMAGE_PIXELS` allows: OSError, ValueError, SyntaxError, struct.error, `DecompressionBombError` and
    others, so callers that must go on catch Exception.
    """
    with open_encoded(data) as image:
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        ImageOps.exif_transpose(image, in_place=True)
        return convert(image)


@dataclass(frozen=True)
class Window:
    """Which part of an image is cut out."""

    share: float = 1.0
    """Of the largest part of the wanted proportions, how much each side has."""
    across: float = 0.5
    """Where it lies: 0 at the left, 1 at the right."""
    down: float = 0.5
    """0 at the top, 1 at the bottom."""


CENTRED = Window()


def decode_image(data: bytes, shape: tuple[int, int, int], window: Window = CENTRED) -> np.ndarray:
    """Decode as `decode_upright` does, cut out the largest centred part of the wanted proportions, and resize it.

    Colour profiles are ignored. The resize is Pillow's Lanczos, whose support grows with the reduction (antialiased;
    Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation"): of Pillow's filters it keeps
    the most detail below the new Nyquist frequency. An image that has the wanted size already is not resampled.

    Args:
        data: the content of an image file.
        shape: (height, width, channels). With 3 channels, RGB, and with 1, its luma, transparent images are composited
            on white. With 4, RGBA, they keep their alpha: they are resized with colours multiplied by it, so that what
            is hidden under transparent pixels does not bleed into the edges, and divided by it again after. Pixels of
            alpha 0 are black, whatever the file hides there.
        window: another part than the largest, centred one.

    Returns uint8 of that shape.
    """
    height, width, channels = shape
    at_least = round(max(height, width) * REDUCING_GAP / window.share)
    image = decode_upright(data, CONVERSIONS[channels], at_least=at_least)
    scale = window.share * min(image.width / width, image.height / height)
    cut_width, cut_height = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = int((image.width - cut_width) * window.across), int((image.height - cut_height) * window.down)
    cut = image.crop((left, top, left + cut_width, top + cut_height))
    # Of RGBA, Pillow itself multiplies the colours by alpha before, and divides them after.
    resized = cut.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)
    pixels = np.array(resized).reshape(shape)
    if channels == 4:
        pixels[pixels[..., 3] == 0] = 0
    return pixels


def _eight_bits(image: Image.Image) -> Image.Image:
    """Integer samples in 0..65535, which Pillow's own conversions clip, to 0..255, rounded (65535 = 257 * 255), with
    alpha where one of them stands for transparency; other modes as they are."""
    if image.mode == "F":
        raise ValueError("floating-point samples have no defined white level")
    if not image.mode.startswith("I"):
        return image
    grey = np.asarray(image)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError("32-bit integer samples have no defined white level")
    reduced = Image.fromarray(((grey.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if (clear := image.info.get("transparency")) is None:
        return reduced
    return Image.merge("LA", (reduced, Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8))))
