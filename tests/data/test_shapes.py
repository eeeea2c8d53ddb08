"""Images of other shapes than RGB squares: what is cut, what becomes of transparency, and how they are shown."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from improved_diffusion.data import open_image_set
from improved_diffusion.data.__main__ import parse_arguments
from improved_diffusion.data.compositing import on_white
from improved_diffusion.data.decode import decode_image
from improved_diffusion.errors import UserError


def encode(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def disc(side: int = 128) -> np.ndarray:
    """An opaque red disc; its surroundings are transparent, and green hides there."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    pixels = np.zeros((side, side, 4), dtype=np.uint8)
    inside = x**2 + y**2 < (0.4 * side) ** 2
    pixels[inside], pixels[~inside] = (200, 0, 0, 255), (0, 255, 0, 0)
    return pixels


@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    wanted=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels=st.sampled_from([1, 3, 4]),
)
def test_the_largest_centred_part_of_the_proportions_is_kept(size, wanted, channels):
    """A picture whose brightness is the distance from its centre along one axis stays symmetrical, and covers all of
    that axis on which nothing is cut off."""
    width, height = size
    across = np.abs(np.arange(width) - (width - 1) / 2) * 2
    pixels = np.broadcast_to(across.astype(np.uint8), (height, width))
    decoded = decode_image(encode(Image.fromarray(pixels)), (*wanted, channels))
    assert (decoded.shape, decoded.dtype) == ((*wanted, channels), np.uint8)
    row = decoded[0, :, 0].astype(int)
    kept = round(min(width, wanted[1] * height / wanted[0]))  # columns
    assert np.abs(row - row[::-1]).max() <= 6 + 2 * (width - kept) % 2 + 2 * kept / wanted[1]
    assert row.max() <= kept + 2 + kept / wanted[1]


def test_a_wide_image_for_a_wide_set_loses_nothing_but_pixels():
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, :40], pixels[:20, 40:], pixels[20:, 40:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    decoded = decode_image(encode(Image.fromarray(pixels)), (8, 16, 3)).astype(int)
    for place, colour in [((1, 1), (250, 0, 0)), ((1, 14), (0, 250, 0)), ((6, 14), (0, 0, 250))]:
        assert np.abs(decoded[place] - colour).max() <= 8
    tall = decode_image(encode(Image.fromarray(pixels)), (40, 20, 3))
    np.testing.assert_array_equal(tall, pixels[:, 30:50])


def test_a_turned_jpeg_is_decoded_no_smaller_than_it_is_wanted():
    """Its sides change places after the cheap reduction of the decoder."""
    stripes = np.tile(np.repeat([0, 255], 50).astype(np.uint8), (400, 16))  # 400 x 1600
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(stripes).save(buffer, "JPEG", quality=95, exif=exif.tobytes())
    decoded = decode_image(buffer.getvalue(), (320, 80, 1))[..., 0]
    np.testing.assert_array_equal(np.flatnonzero(np.diff(decoded[:, 40] > 127)), np.arange(9, 319, 10))


@pytest.mark.parametrize("side", [32, 33, 100])
def test_what_hides_under_transparent_pixels_never_shows(side):
    decoded = decode_image(encode(Image.fromarray(disc())), (side, side, 4)).astype(int)
    colours, alpha = decoded[..., :3], decoded[..., 3]
    assert {0, 255} < set(alpha.flatten().tolist())
    assert (colours[alpha == 0] == 0).all()
    assert (colours[..., 1:] == 0).all()
    assert colours[..., 0][alpha > 16].min() > 160  # no dark edge; that of Lanczos alone is this bright
    straight = np.asarray(Image.fromarray(disc()[..., 3]).resize((side, side), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(alpha - straight).max() <= 1


def test_an_image_at_size_keeps_its_alpha_and_hides_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 4), dtype=np.uint8)
    pixels[:4, :, 3] = 0
    decoded = decode_image(encode(Image.fromarray(pixels)), (16, 24, 4))
    visible = pixels[..., 3] > 0
    np.testing.assert_array_equal(decoded[visible], pixels[visible])
    assert (decoded[~visible] == 0).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16"])
def test_an_image_without_transparency_is_opaque(mode):
    grey = Image.fromarray(np.tile(np.linspace(0, 65535, 16).astype(np.uint16), (16, 1)))
    image = grey if mode == "I;16" else Image.fromarray(disc(16)[..., 0]).convert(mode)
    decoded = decode_image(encode(image), (16, 16, 4))
    assert (decoded[..., 3] == 255).all()
    np.testing.assert_array_equal(decoded[..., :3], decode_image(encode(image), (16, 16, 3)))


def test_transparency_of_palettes_and_grey_images():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 250, 10, 20])
    palette.paste(0, (0, 0, 4, 8))
    decoded = decode_image(encode(palette, transparency=0), (8, 8, 4))
    assert (decoded[:, :4] == 0).all()
    assert (decoded[:, 4:] == (250, 10, 20, 255)).all()
    half = Image.merge("LA", [Image.new("L", (8, 8), 100), Image.new("L", (8, 8), 128)])
    assert (decode_image(encode(half), (8, 8, 4)) == (100, 100, 100, 128)).all()


def test_grey_is_luma_on_white():
    pixels = disc(64)
    decoded = decode_image(encode(Image.fromarray(pixels)), (64, 64, 1))
    assert decoded[32, 32, 0] == round(0.299 * 200)
    assert decoded[0, 0, 0] == 255
    levels = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(levels)), (64, 64, 1))[..., 0], levels)


def test_on_white_is_what_pillow_makes_of_every_colour_and_alpha():
    colour, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    rgba = np.stack([colour, colour[::-1], colour.T, alpha], axis=-1)
    white = Image.new("RGBA", (256, 256), "white")
    expected = np.asarray(Image.alpha_composite(white, Image.fromarray(rgba)).convert("RGB"))
    np.testing.assert_array_equal(on_white(torch.from_numpy(rgba)).numpy(), expected)
    grey = torch.from_numpy(colour[..., None])
    np.testing.assert_array_equal(on_white(grey).numpy(), np.repeat(colour[..., None], 3, axis=-1))
    rgb = torch.from_numpy(rgba[..., :3])
    assert torch.equal(on_white(rgb), rgb)


@pytest.mark.parametrize("size", ["16x", "16x24x3", "0x16", "x", "wide", "-4"])
def test_a_size_that_is_none(size):
    with pytest.raises(UserError, match="--image-size"):
        parse_arguments(["folder", "anywhere", "--out", "out", f"--image-size={size}"])


def test_command_line(tmp_path: Path):
    (tmp_path / "set" / "a").mkdir(parents=True)
    Image.fromarray(disc(48)).save(tmp_path / "set" / "a" / "1.png")
    flags = ["--out", str(tmp_path / "out"), "--image-size", "16x24", "--channels", "4"]
    command = [sys.executable, "-m", "improved_diffusion.data", "folder", str(tmp_path / "set"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = decode_image((tmp_path / "set" / "a" / "1.png").read_bytes(), (16, 24, 4))
    np.testing.assert_array_equal(open_image_set(tmp_path / "out").images, expected[None])
    description = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (description["image_size"], description["channels"]) == ([16, 24], 4)
