"""Pictures of food drawn by code: a data set with no download, and with its true distribution at hand.

Sixteen of Food101's classes, 64x64 RGB, each picture a pure function of (seed, class name, index): geometry, colours,
toppings, arrangement, crockery, table, camera and light are all drawn anew. Fresh samples never run out, so a test
split is simply another range of indices.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Callable

import numpy as np

from improved_diffusion.data.synthetic import cakes, savoury, sweet
from improved_diffusion.data.synthetic.canvas import Canvas
from improved_diffusion.errors import UserError

DISHES: dict[str, Callable[[Canvas], None]] = {
    "chocolate_cake": cakes.chocolate_cake,
    "creme_brulee": sweet.creme_brulee,
    "cup_cakes": cakes.cup_cakes,
    "donuts": sweet.donuts,
    "edamame": savoury.edamame,
    "french_fries": savoury.french_fries,
    "hamburger": savoury.hamburger,
    "hot_dog": savoury.hot_dog,
    "ice_cream": sweet.ice_cream,
    "macarons": sweet.macarons,
    "pancakes": sweet.pancakes,
    "pizza": savoury.pizza,
    "spaghetti_bolognese": savoury.spaghetti_bolognese,
    "strawberry_shortcake": cakes.strawberry_shortcake,
    "sushi": savoury.sushi,
    "waffles": sweet.waffles,
}
CLASS_NAMES: tuple[str, ...] = tuple(sorted(DISHES))


def draw(seed: int, class_name: str, index: int) -> np.ndarray:
    """Picture number `index` of a class: uint8 (64, 64, 3), RGB. The same arguments always give the same picture.

    seed, index: integers from 0.
    Raises UserError for an unknown class name, ValueError for a negative seed or index.
    """
    if class_name not in DISHES:
        near = difflib.get_close_matches(class_name, CLASS_NAMES, n=3) or CLASS_NAMES
        raise UserError(f"no synthetic class is called {class_name!r}; did you mean one of: {', '.join(near)}?")
    entropy = [seed, zlib.crc32(class_name.encode()), index]  # the name, not its rank: new classes change no picture
    canvas = Canvas(np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy))))
    DISHES[class_name](canvas)
    return canvas.develop()


def draw_set(seed: int, per_class: int, first_index: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pictures `first_index` to `first_index + per_class - 1` of every class, one class after another.

    Returns images uint8 (N, 64, 64, 3) and labels int64 (N,), N = len(CLASS_NAMES) * per_class; label k is
    CLASS_NAMES[k]. Sets with index ranges that do not meet are independent samples of one distribution.
    """
    indices = range(first_index, first_index + per_class)
    images = np.empty((len(CLASS_NAMES), per_class, 64, 64, 3), np.uint8)
    for label, class_name in enumerate(CLASS_NAMES):
        for position, index in enumerate(indices):
            images[label, position] = draw(seed, class_name, index)
    return images.reshape(-1, 64, 64, 3), np.repeat(np.arange(len(CLASS_NAMES)), per_class)
