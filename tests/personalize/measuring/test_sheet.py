from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.personalize.measuring.sheet import SIDE, contact_sheet


def test_pictures_stand_in_their_places_and_holes_stay_white():
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    wide = Image.new("RGB", (64, 32), "lime")
    sheet = contact_sheet([[red, blue], [None, wide]], ["first", "a very long title " * 5], ["one", "two"])
    assert sheet.dtype == np.uint8
    left, top = sheet.shape[1] - 2 * SIDE, sheet.shape[0] - 2 * SIDE
    assert left > 0
    assert top > 0

    def centre(row: int, column: int) -> tuple[int, ...]:
        return tuple(sheet[top + row * SIDE + SIDE // 2, left + column * SIDE + SIDE // 2])

    assert [centre(0, 0), centre(0, 1), centre(1, 0), centre(1, 1)] == [
        (255, 0, 0),
        (0, 0, 255),
        (255, 255, 255),
        (0, 255, 0),
    ]
    assert tuple(sheet[top + SIDE + 5, left + SIDE + SIDE // 2]) == (255, 255, 255)  # above the wide one
    assert (sheet[:, :left] < 128).any()  # the titles


@pytest.fixture
def few_files() -> Iterator[int]:
    """How many files may be open at once, and are not yet."""
    resource = pytest.importorskip("resource")
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 16
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + few, most))
    yield few
    resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))


def test_a_sheet_shows_more_pictures_than_files_may_be_open(tmp_path: Path, few_files: int):
    colours = [(5 * number, 0, 255) for number in range(3 * few_files)]
    files = [tmp_path / f"{number}.png" for number in range(len(colours))]
    for file, colour in zip(files, colours, strict=True):
        Image.new("RGB", (8, 8), colour).save(file)
    sheet = contact_sheet([[file] for file in files], ["title"] * len(files))
    middles = sheet[SIDE // 2 :: SIDE, sheet.shape[1] - SIDE // 2]
    assert [tuple(colour) for colour in middles[-len(colours) :]] == colours
