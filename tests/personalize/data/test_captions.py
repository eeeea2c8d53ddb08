"""Captions that vary from sight to sight."""

from __future__ import annotations

from collections import Counter

import torch

from improved_diffusion.personalize.config import ImagesConfig
from improved_diffusion.personalize.data.captions import vary

TAGS = "sks dog, red collar,  grass , sunny"


def varied(count: int, **settings) -> Counter:
    generator = torch.Generator().manual_seed(0)
    return Counter(vary([TAGS] * count, ImagesConfig(**settings), generator))


def test_as_it_is():
    assert varied(3) == {TAGS: 3}


def test_all_orders_of_all_tags_but_the_first():
    found = varied(6000, shuffle_tags=True)
    assert len(found) == 6  # 3!
    assert all(set(text.split(", ")) == {"sks dog", "red collar", "grass", "sunny"} for text in found)
    assert all(text.startswith("sks dog, ") for text in found)
    assert all(abs(count - 1000) < 5 * (6000 * 1 / 6 * 5 / 6) ** 0.5 for count in found.values())
    assert len(varied(2000, shuffle_tags=True, keep_tags=0)) == 24
    assert len(varied(50, shuffle_tags=True, keep_tags=9)) == 1


def test_dropout():
    found = varied(4000, caption_dropout=0.1)
    assert abs(found[""] - 400) < 5 * (4000 * 0.1 * 0.9) ** 0.5
    assert set(found) == {"", TAGS}
    assert varied(5, caption_dropout=1.0) == {"": 5}
