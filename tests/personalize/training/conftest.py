from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of five pictures of a red disc before backgrounds of their own, of several sizes; one has a caption."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number, size in enumerate([(96, 64), (64, 96), (80, 80), (128, 96), (64, 64)]):
        colour = tuple(int(value) for value in generator.integers(0, 255, 3))
        picture = Image.new("RGB", size, colour)
        x, y = (generator.integers(8, side - 40) for side in size)
        ImageDraw.Draw(picture).ellipse([x, y, x + 32, y + 32], fill="red")
        picture.save(folder / f"{number}.png")
    (folder / "0.txt").write_text("a sks ball on a lawn")
    return folder
