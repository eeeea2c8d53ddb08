"""What Telegram takes as a sticker, whatever is shown."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from improved_diffusion.errors import UserError
from improved_diffusion.stickers.commands import options
from improved_diffusion.stickers.finish import FORMATS, MOST_BYTES, SIDE, encode, finish, finish_photos, require_sticker
from improved_diffusion.stickers.photos import find_photos


def disc(radius: int, side: int = 256) -> Image.Image:
    picture = Image.new("RGBA", (4 * side, 4 * side))
    middle, reach = 2 * side, 4 * radius
    ImageDraw.Draw(picture).ellipse(
        (middle - reach, middle - reach, middle + reach - 1, middle + reach - 1), fill="red"
    )
    return picture.reduce(4)


@settings(max_examples=5, deadline=None)
@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.integers(0, 2**32 - 1),
    st.integers(0, 40),
    st.sampled_from(FORMATS),
)
def test_any_content_fits(size, seed, outline, kind):
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 4), dtype=np.uint8)
    noise[0, 0, 3], noise[-1, -1, 3] = 0, 255
    if size == (1, 1):
        noise = np.pad(noise, ((0, 1), (0, 0), (0, 0)))
    data = encode(finish(Image.fromarray(noise), outline), kind)
    image = Image.open(io.BytesIO(data))
    assert (image.format, max(image.size)) == (kind.upper(), SIDE)
    assert len(data) < MOST_BYTES


@pytest.mark.parametrize("kind", FORMATS)
def test_what_no_compression_helps_loses_as_little_as_it_must(kind):
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
    data = encode(Image.fromarray(noise), kind)
    assert 0.4 * MOST_BYTES < len(data) < MOST_BYTES
    flat = Image.new("RGBA", (SIDE, SIDE), (10, 200, 30, 255))
    assert np.array_equal(Image.open(io.BytesIO(encode(flat, kind))).convert("RGBA"), flat), "what fits loses nothing"


def test_it_is_cropped_to_what_can_be_seen():
    picture = Image.new("RGBA", (300, 200), (0, 0, 0, 5))  # a haze that nobody sees
    picture.paste((0, 0, 255, 255), (100, 50, 180, 90))
    sticker = finish(picture)
    assert sticker.size == (SIDE, SIDE // 2)
    assert sticker.getpixel((4, 4)) == (0, 0, 255, 255)


@pytest.mark.parametrize("width", [4, 30])
def test_an_outline_is_as_wide_as_it_should_be_and_smooth(width):
    sticker = np.asarray(finish(disc(100), width), dtype=float)
    assert sticker.shape == (SIDE, SIDE, 4)
    inner = SIDE / 2 - width
    white = (sticker[..., 3] * (sticker[..., 1] > 100)).sum() / 255
    assert white == pytest.approx(math.pi * ((SIDE / 2) ** 2 - inner**2), rel=0.6 / width + 0.02)
    y, x = np.indices((SIDE, SIDE)) - SIDE / 2 + 0.5
    distance = np.hypot(x, y)
    middle_of_ring = np.abs(distance - inner - width / 2) < width / 4
    assert (sticker[middle_of_ring][:, 3] > 250).all()
    edge = sticker[np.abs(distance - SIDE / 2) < 0.5][:, 3]
    assert len(np.unique(edge)) > 5, "it has steps between nothing and all"


@pytest.mark.parametrize(
    ("picture", "outline", "problem"),
    [
        (Image.new("RGB", (64, 64)), 0, "no transparency"),
        (Image.new("RGBA", (64, 64)), 0, "it is transparent"),
        (disc(20, 64), 65, "0 to 64 pixels wide"),
        (disc(20, 64), -1, "0 to 64 pixels wide"),
    ],
)
def test_what_is_no_cut_out_is_refused(picture, outline, problem):
    with pytest.raises(UserError, match=problem):
        finish(picture, outline)


def test_files_are_read_again(tmp_path):
    disc(20, 64).save(tmp_path / "disc.png")
    photos = find_photos([tmp_path / "disc.png"])
    (file,) = finish_photos(photos, tmp_path / "out", 0, "webp").made.values()
    require_sticker(file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="is no sticker"):
        finish_photos(photos, tmp_path / "out", 0, "webp")
    disc(20, 64).save(file)
    with pytest.raises(UserError, match="64 x 64, and one side of a sticker 512"):
        require_sticker(file)


def test_the_flags_name_the_formats_that_there_are():
    from improved_diffusion.personalize.models.judges import BLIP

    assert (options.FORMATS, options.BLIP) == (FORMATS, BLIP)
