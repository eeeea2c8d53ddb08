"""What is cut out, and what its edges look like."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from improved_diffusion.errors import UserError
from improved_diffusion.stickers.cut import cut_out
from improved_diffusion.stickers.matte import identity, load_matter
from tests.stickers.conftest import darkness


def soft_disc(side: int = 96) -> np.ndarray:
    y, x = np.indices((side, side)) - side / 2 + 0.5
    return (0.5 - (np.hypot(x, y) - side / 3) / 6).clip(0, 1).astype(np.float32)


def test_edges_lose_the_colour_of_the_background():
    pytest.importorskip("pymatting")
    alpha = soft_disc()
    red, green = np.array([200, 30, 30]), np.array([20, 220, 40])
    mixed = np.rint(alpha[..., None] * red + (1 - alpha[..., None]) * green).astype(np.uint8)
    cut = np.asarray(cut_out(Image.fromarray(mixed), lambda image: alpha), dtype=float)
    edge = (alpha > 0.2) & (alpha < 0.9)
    before = np.abs(mixed[edge] - red).mean()
    assert np.abs(cut[edge][:, :3] - red).mean() < 0.15 * before
    assert np.abs(cut[..., 3] / 255 - alpha).max() < 0.03, "alpha stays soft"
    assert not cut[cut[..., 3] == 0].any(), "what is not seen hides nothing"


def test_a_picture_without_foreground_is_refused(keep_colours):
    with pytest.raises(UserError, match="nothing stands out"):
        cut_out(Image.new("RGB", (64, 64), "white"), darkness)


def test_a_pictures_own_transparency_keeps_its_own_colours():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    pixels[..., 3] = np.where(np.indices((32, 32))[0] < 16, 100, 255)
    pixels[:4, :, 3] = 0
    cut = np.asarray(cut_out(Image.fromarray(pixels), load_matter("alpha")))
    assert np.array_equal(cut[4:], pixels[4:])
    assert not cut[:4].any()
    with pytest.raises(UserError, match="no transparency of its own"):
        cut_out(Image.new("RGB", (32, 32)), load_matter("alpha"))


def test_a_trained_cut_out_is_known_by_its_weights(cutout):
    transparent = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert load_matter(cutout)(transparent).max() == 0, "transparency is white to a network"
    before = identity(cutout)
    assert identity(cutout / "cutout.safetensors") == before
    (cutout / "cutout.safetensors").write_bytes(b"others")
    assert identity(cutout) != before


def test_what_ships_cuts_a_drawing_out_of_its_background():
    """A face, drawn by nobody's icon set."""
    picture = Image.new("RGB", (300, 200), (90, 160, 200))
    face, whole = ImageDraw.Draw(picture), Image.new("L", picture.size)
    ImageDraw.Draw(whole).ellipse((80, 30, 220, 170), fill=255)
    face.ellipse((80, 30, 220, 170), fill=(250, 210, 60), outline=(120, 80, 10), width=6)
    for x in (115, 165):
        face.ellipse((x, 70, x + 18, 95), fill=(60, 40, 10))
    face.arc((110, 80, 190, 150), 20, 160, fill=(60, 40, 10), width=6)
    alpha, truth = load_matter()(picture) > 0.5, np.asarray(whole) > 0
    assert (alpha & truth).sum() / (alpha | truth).sum() > 0.95


def test_birefnet_is_that_of_rembg(monkeypatch):
    mask = Image.new("L", (12, 8), 51)
    session = SimpleNamespace(predict=lambda image: [mask.resize(image.size)])
    monkeypatch.setitem(sys.modules, "rembg", SimpleNamespace(new_session=lambda name: session))
    alpha = load_matter("birefnet")(Image.new("RGB", (12, 8)))
    assert (alpha.shape, alpha.dtype) == ((8, 12), np.float32)
    assert alpha == pytest.approx(0.2)


def without_weights(name: str):
    raise OSError("Name or service not known")


@pytest.mark.parametrize(
    ("name", "rembg", "problem"),
    [
        ("missing", None, "there is no cut-out at missing"),
        ("birefnet", None, r"pip install 'rembg\[cpu\]'"),
        ("birefnet", SimpleNamespace(new_session=without_weights), "rembg d birefnet-general"),
    ],
)
def test_what_is_not_there_is_told_how_to_get(name, rembg, problem, monkeypatch):
    monkeypatch.setitem(sys.modules, "rembg", rembg)
    with pytest.raises(UserError, match=problem):
        load_matter(name)
