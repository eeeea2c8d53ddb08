"""Decoding: every kind of file ends as the RGB square that a person would expect to see."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from improved_diffusion.data import decode
from improved_diffusion.data.decode import decode_image


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    if kind == "HEIF":
        pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode_square(data: bytes, side: int) -> np.ndarray:
    return decode_image(data, (side, side, 3))


def smooth_photo(width: int, height: int) -> Image.Image:
    """Gradients and soft waves: as a photo, little of it is near the pixel frequency."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [0.5 + 0.4 * np.sin(40 * x + 10 * y), 0.5 + 0.4 * np.cos(25 * y), 0.2 + 0.6 * x * y]
    return Image.fromarray((255 * np.stack(waves, axis=-1)).astype(np.uint8))


def quadrants(side: int = 32) -> Image.Image:
    """Red, green / blue, white: tells every flip and rotation from every other."""
    pixels = np.zeros((side, side, 3), dtype=np.uint8)
    half = side // 2
    pixels[:half, :half], pixels[:half, half:] = (255, 0, 0), (0, 255, 0)
    pixels[half:, :half], pixels[half:, half:] = (0, 0, 255), (255, 255, 255)
    return Image.fromarray(pixels)


def test_image_at_size_is_untouched():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_square(encode(Image.fromarray(pixels)), 48), pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "HEIF"])
def test_formats(kind: str):
    decoded = decode_square(encode(smooth_photo(80, 80), kind), 40)
    expected = np.asarray(smooth_photo(80, 80).resize((40, 40), Image.Resampling.LANCZOS), dtype=float)
    assert decoded.shape == (40, 40, 3)
    assert decoded.dtype == np.uint8
    assert np.abs(decoded - expected).mean() < 6  # lossy formats subsample colour


@pytest.mark.parametrize("size", [(100, 40), (40, 100), (41, 100)])
def test_centre_square_is_kept(size: tuple[int, int]):
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    pixels[top : top + side, left : left + side] = 200
    np.testing.assert_array_equal(decode_square(encode(Image.fromarray(pixels)), 20), 200)


def test_resize_is_antialiased():
    """Stripes finer than the new pixels become even grey instead of a moire pattern."""
    stripes = np.zeros((256, 256, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    decoded = decode_square(encode(Image.fromarray(stripes)), 30).astype(int)
    assert np.abs(decoded[:, 1:-1] - 127.5).max() <= 2


def test_cheap_reduction_of_large_jpeg_stays_near_the_full_resize():
    photo = smooth_photo(1600, 1200)
    data = encode(photo, "JPEG", quality=95)
    square = Image.open(io.BytesIO(data)).convert("RGB").crop((200, 0, 1400, 1200))
    full = np.asarray(square.resize((64, 64), Image.Resampling.LANCZOS), dtype=float)
    difference = np.abs(decode_square(data, 64) - full)
    assert difference.mean() < 0.5
    assert difference.max() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "HEIF"])
def test_exif_orientation(orientation: int, kind: str):
    undo = {  # the stored picture that a viewer turns back into `quadrants`
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = quadrants() if undo is None else quadrants().transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_square(encode(stored, kind, exif=exif.tobytes()), 32)
    corners = decoded[[4, 4, -5, -5], [4, -5, 4, -5]].astype(int)
    assert np.abs(corners - [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]).max() < 40


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_greyscale_and_palette(mode: str):
    image = quadrants().convert(mode)
    np.testing.assert_array_equal(decode_square(encode(image), 32), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 128, 0), (0, 0, 255), (250, 250, 250), (10, 10, 10)])
def test_cmyk_jpeg_keeps_its_colour(colour: tuple[int, int, int]):
    image = Image.new("RGB", (32, 32), colour).convert("CMYK")
    decoded = decode_square(encode(image, "JPEG", quality=95), 32).astype(int)
    assert np.abs(decoded - colour).max() < 12


def test_alpha_is_composited_on_white():
    pixels = np.zeros((16, 16, 4), dtype=np.uint8)
    pixels[..., 0] = 200
    pixels[:, :8, 3], pixels[:, 8:, 3] = 255, 51  # opaque; a fifth
    decoded = decode_square(encode(Image.fromarray(pixels)), 16)
    np.testing.assert_array_equal(decoded[:, :8], np.broadcast_to([200, 0, 0], (16, 8, 3)))
    assert np.abs(decoded[:, 8:].astype(float) - [244, 204, 204]).max() <= 1


def test_grey_with_alpha():
    pixels = np.zeros((16, 16, 2), dtype=np.uint8)  # black, fully transparent
    np.testing.assert_array_equal(decode_square(encode(Image.fromarray(pixels)), 16), 255)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparent_palette_entry_is_white(kind: str):
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 250, 10, 20])
    image.paste(0, (0, 0, 8, 16))
    decoded = decode_square(encode(image, kind, transparency=0), 16)
    np.testing.assert_array_equal(decoded[:, :8], 255)
    np.testing.assert_array_equal(decoded[:, 8:], np.broadcast_to([250, 10, 20], (16, 8, 3)))


def test_transparent_colour_of_an_rgb_png():
    image = Image.new("RGB", (16, 16), (1, 2, 3))
    image.paste((9, 8, 7), (0, 0, 8, 16))
    decoded = decode_square(encode(image, transparency=(1, 2, 3)), 16)
    np.testing.assert_array_equal(decoded[:, 8:], 255)
    np.testing.assert_array_equal(decoded[:, :8], np.broadcast_to([9, 8, 7], (16, 8, 3)))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_greyscale_is_scaled(kind: str):
    levels = np.linspace(0, 65535, 64).astype(np.uint16)
    decoded = decode_square(encode(Image.fromarray(np.tile(levels, (64, 1))), kind), 64)
    np.testing.assert_array_equal(decoded, np.tile(np.rint(levels / 257)[None, :, None], (64, 1, 3)))


def test_transparent_level_of_sixteen_bit_greyscale():
    grey = np.tile(np.array([5000, 60000], np.uint16), (8, 4))
    data = encode(Image.fromarray(grey), transparency=5000)
    np.testing.assert_array_equal(decode_image(data, (8, 8, 3))[0, :2, 0], [255, round(60000 / 257)])
    np.testing.assert_array_equal(decode_image(data, (8, 8, 4))[0, :2, 3], [0, 255])


def test_float_samples_are_refused():
    with pytest.raises(ValueError, match="white level"):
        decode_square(encode(Image.fromarray(np.ones((8, 8), dtype=np.float32)), "TIFF"), 8)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    decoded = decode_square(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), 16)
    np.testing.assert_array_equal(decoded, np.broadcast_to([255, 0, 0], (16, 16, 3)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "HEIF"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_truncated_file_is_an_error_not_half_an_image(kind: str, kept: float):
    noise = np.random.default_rng(1).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), kind)
    with pytest.raises(Exception):  # noqa: B017, PT011 - Pillow has no common base class
        decode_square(data[: int(kept * len(data))], 64)


def test_a_heic_photo_that_cannot_be_read_is_named_as_what_it_is(monkeypatch: pytest.MonkeyPatch):
    data = encode(quadrants(), "HEIF")
    monkeypatch.setattr(decode, "FORMATS", ["JPEG", "PNG"])  # as without the library
    with pytest.raises(UnidentifiedImageError, match="a HEIC photo: to read it pip install pillow-heif"):
        decode_square(data, 32)
    with pytest.raises(UnidentifiedImageError, match="damaged, or not an image of a known format"):
        decode_square(b"text", 32)


def test_decompression_bomb_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        decode_square(encode(Image.new("RGB", (64, 64))), 64)
