from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from improved_diffusion.runtime.devices import usable_device
from tests.personalize.conftest import scripts, tiny_judges  # noqa: F401


def darkness(image: Image.Image) -> np.ndarray:
    """A matter for dark things before light backgrounds."""
    return (1 - np.asarray(image.convert("L"), np.float32) / 255).clip(0, 1)


@pytest.fixture
def cutout(tmp_path, monkeypatch) -> Path:
    """A folder as `segment train` writes one, of a network that finds what is dark."""
    folder = tmp_path / "cutout"
    folder.mkdir()
    (folder / "cutout.safetensors").write_bytes(b"weights")
    segment = SimpleNamespace(load_cutout=lambda path, device: usable_device(device) and darkness)
    monkeypatch.setitem(sys.modules, "improved_diffusion.stickers.segment", segment)
    return folder


@pytest.fixture
def keep_colours(monkeypatch) -> None:
    """Leave edges as they are: pymatting takes a minute to compile in a new installation."""
    from improved_diffusion.stickers import cut

    monkeypatch.setattr(cut, "foreground", lambda colours, alpha: colours)


@pytest.fixture(scope="session")
def photograph(tmp_path_factory) -> Callable[[str, tuple[int, int]], Path]:
    """Makes a picture of a dark disc on white."""
    folder = tmp_path_factory.mktemp("photographs")

    def make(name: str, size: tuple[int, int] = (96, 64)) -> Path:
        picture = Image.new("RGB", size, "white")
        ImageDraw.Draw(picture).ellipse((20, 10, 60, 50), fill=(120, 0, 20))
        picture.save(folder / name)
        return folder / name

    return make


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory, scripts) -> Path:  # noqa: F811
    from tiny_pipeline import make_pipeline

    folder = tmp_path_factory.mktemp("base") / "sd"
    make_pipeline("sd").save_pretrained(folder)
    return folder
