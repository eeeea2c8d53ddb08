"""Cakes: each function paints one dish, a new one every time, onto an empty canvas."""

from __future__ import annotations

import numpy as np

from improved_diffusion.data.synthetic.canvas import Canvas, rgb
from improved_diffusion.data.synthetic.scene import (
    BLUEBERRY,
    CHERRY,
    CREAM,
    FROSTINGS,
    RASPBERRY,
    berry,
    counter,
    pick,
    plate,
    scatter,
    sprinkles,
    strawberry,
    table,
    vary,
)
from improved_diffusion.data.synthetic.shapes import Shape, convex, dots, ellipse

PAPERS = [rgb("f2d7a0"), rgb("e86a8a"), rgb("f4f0ea"), rgb("6fb7c8"), rgb("5b3a29"), rgb("f0b93a")]


def chocolate_cake(canvas: Canvas) -> None:
    """A dark slice with icing between the layers."""
    rng = canvas.rng
    table(canvas)
    plate(canvas, 0, 0.2, rng.uniform(1.0, 1.1), rng.uniform(0.62, 0.75))
    cream = pick(rng, [rgb("7d4a2c"), rgb("ecdcc4"), rgb("a06a3f")])
    crown = _slice(canvas, vary(rng, rgb("5f3219"), 0.03), cream, vary(rng, rgb("3f1f12"), 0.02), pick(rng, [2, 3]))
    topping = rng.random()
    if topping < 0.4:
        berry(canvas, *crown, 0.13, pick(rng, [CHERRY, RASPBERRY]))
    elif topping < 0.7:
        canvas.paint(dots(scatter(rng, 5, 0.05, 0.1) + crown, 0.11), CREAM, bulge=0.1, shadow=0.3, lift=0.04)


def cup_cakes(canvas: Canvas) -> None:
    """A pleated paper cup under a swirl of frosting, from the side; one large, or two behind each other."""
    rng = canvas.rng
    counter(canvas, rng.uniform(-0.1, 0.35))
    if rng.random() < 0.7:
        _cup_cake(canvas, rng.uniform(-0.06, 0.06), 0.86, rng.uniform(0.95, 1.06))
    else:
        side = pick(rng, [-1, 1])
        _cup_cake(canvas, 0.44 * side, 0.62, 0.66)
        _cup_cake(canvas, -0.36 * side, 0.85, 0.76)


def _cup_cake(canvas: Canvas, cx: float, base: float, size: float) -> None:
    rng = canvas.rng
    height, wide, narrow = 0.72 * size, 0.58 * size, 0.42 * size
    lip = base - height
    canvas.paint(ellipse(cx, base, 0.6 * size, 0.1 * size), rgb("000000"), alpha=0.25)
    paper = vary(rng, pick(rng, PAPERS))
    pleats = paper * (0.86 + 0.16 * np.sin((canvas.x - cx) * (30 + 8 * (base - canvas.y)) / size))
    cup = convex([(cx - wide, lip), (cx + wide, lip), (cx + narrow, base), (cx - narrow, base)])
    canvas.paint(cup, pleats, bulge=0.3 * size, shadow=0.35)
    colour = vary(rng, pick(rng, FROSTINGS), 0.02)
    steps = pick(rng, [3, 4])
    lean = rng.uniform(-0.05, 0.05)
    for i in range(steps):
        share = i / (steps - 1)
        rx, ry = (0.68 - 0.46 * share) * size, (0.82 / steps - 0.06 * share) * size
        cy = lip - (0.02 + 0.62 * share) * size
        tier = ellipse(cx + lean * share, cy, rx, ry, rng.uniform(-0.14, -0.04))
        canvas.paint(tier, colour * (1 + 0.03 * i), bulge=ry, shine=0.2, shadow=0.25, lift=0.06)
    top = lip - 0.8 * size
    if rng.random() < 0.55:
        berry(canvas, cx + lean, top, 0.13 * size, pick(rng, [CHERRY, CHERRY, RASPBERRY, BLUEBERRY]))
    if rng.random() < 0.5:
        u, v = rng.uniform(-0.9, 0.9, 14), rng.uniform(0, 1, 14)
        spots = np.stack([cx + u * (0.6 - 0.45 * v) * size, lip - (0.62 * v - 0.03) * size], 1)
        sprinkles(canvas, spots, 0.07 * size, 0.022 * size)


def strawberry_shortcake(canvas: Canvas) -> None:
    """A pale slice with whipped cream and strawberries."""
    rng = canvas.rng
    table(canvas)
    plate(canvas, 0, 0.2, rng.uniform(1.0, 1.1), rng.uniform(0.62, 0.75))
    icing = vary(rng, rgb("fdf8f0"), 0.01)
    cx, cy = _slice(canvas, vary(rng, rgb("efc878"), 0.03), CREAM, icing, 2, filled=True)
    if rng.random() < 0.5:
        strawberry(canvas, cx - 0.34, cy + 0.1, 0.2, rng.uniform(-0.7, 0.7))
    strawberry(canvas, cx, cy - 0.08, rng.uniform(0.27, 0.32), rng.uniform(-0.5, 0.5))


def _slice(
    canvas: Canvas, sponge: np.ndarray, cream: np.ndarray, icing: np.ndarray, layers: int, filled: bool = False
) -> tuple[float, float]:
    """A wedge with its cut side to the viewer, strawberries in the cream if `filled`. Returns the middle of its top."""
    rng = canvas.rng
    flip = pick(rng, [-1, 1])
    x0, y0, x1, y1 = -0.8, rng.uniform(-0.02, 0.1), 0.7, rng.uniform(0.0, 0.14)
    back, height = (0.5, -0.46), rng.uniform(0.56, 0.66)

    def face(*points: tuple[float, float]) -> Shape:
        return convex([(flip * x, y) for x, y in points[::flip]])

    def band(top: float, bottom: float) -> Shape:
        return face((x0, y0 + top), (x1, y1 + top), (x1, y1 + bottom), (x0, y0 + bottom))

    canvas.paint(band(0, height), sponge, mottle=0.09, cells=24, shadow=0.55, lift=0.14)
    for middle in (np.arange(1, layers) * (height / layers) + 0.04).tolist():
        canvas.paint(band(middle - 0.07, middle + 0.07), cream, rough=0.012)
        if filled:
            u = np.linspace(0.12, 0.88, 5) + rng.uniform(-0.03, 0.03, 5)
            halves = np.stack([flip * (x0 + u * (x1 - x0)), y0 + u * (y1 - y0) + middle], 1)
            canvas.paint(dots(halves, 0.085), rgb("e0323c"), bulge=0.05)
    canvas.paint(band(-0.01, 0.1), icing * 0.94, rough=0.015)
    canvas.paint(face((x0, y0), back, (x1, y1)), icing * 1.06, bulge=0.1, shine=0.35)
    return flip * 0.34, -0.14
