from __future__ import annotations

import numpy as np
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
