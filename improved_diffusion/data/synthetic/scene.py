"""What a dish stands on and what goes with several dishes: tables, walls, plates, leaves, berries, sprinkles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from improved_diffusion.data.synthetic.canvas import Canvas, clamp, mix, rgb
from improved_diffusion.data.synthetic.shapes import capsules, dots, ellipse

WOODS = [(rgb("8a5a35"), rgb("5c3820")), (rgb("b98a5a"), rgb("946638")), (rgb("5a4334"), rgb("3a2a21"))]
CLOTHS = [rgb("c9d3da"), rgb("6f8fa3"), rgb("3f5a5e"), rgb("d8cdb8"), rgb("8b9a86"), rgb("50506b")]
STONES = [rgb("40444a"), rgb("d9d7d2"), rgb("86888a"), rgb("2c2e33")]
WALLS = [rgb("cfd8d6"), rgb("93aab0"), rgb("56666d"), rgb("e2d6c3"), rgb("a8b39b"), rgb("3c4046"), rgb("b9a7b5")]
CHINA = [rgb("f4f2ee"), rgb("f7f1e3"), rgb("e9eef1"), rgb("f4f2ee"), rgb("c5d5dc"), rgb("4a5157")]
RIMS = [rgb("3f6c9c"), rgb("9aa8ae"), rgb("c2a15a"), rgb("7a9a80")]
LEAF = rgb("4c9a3c")
CREAM = rgb("fbf3e4")
CHERRY, BLUEBERRY, RASPBERRY = rgb("c3142d"), rgb("3c4a86"), rgb("cf2450")
FROSTINGS = [rgb("f7a8c4"), rgb("fbf3e6"), rgb("6b3d26"), rgb("a5dccb"), rgb("c3a5e4"), rgb("f9d976"), rgb("8cc4ee")]
SPRINKLES = [rgb("f25c78"), rgb("ffd23f"), rgb("4ecdc4"), rgb("fdfdfd"), rgb("7a6ff0"), rgb("8bd450")]

T = TypeVar("T")


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options (`rng.choice` would make an array of them)."""
    return options[rng.integers(len(options))]


def vary(rng: np.random.Generator, colour: np.ndarray, amount: float = 0.04) -> np.ndarray:
    """The colour, a little lighter or darker and a little off in hue."""
    hue = rng.uniform(-amount, amount, (3, 1, 1)).astype(np.float32)
    return colour * rng.uniform(1 - 1.5 * amount, 1 + 1.5 * amount) + hue


def table(canvas: Canvas) -> None:
    """Cover the picture with wood, cloth or stone."""
    rng = canvas.rng
    kind = pick(rng, ["wood", "cloth", "stone"])
    if kind == "wood":
        light, dark = pick(rng, WOODS)
        grain = canvas.noise(3, 26) if rng.random() < 0.7 else canvas.noise(26, 3)
        surface = mix(light, dark, 0.5 + 0.28 * grain)
    elif kind == "cloth":
        surface = vary(rng, pick(rng, CLOTHS)) * (1 + 0.03 * canvas.noise(6) + 0.02 * canvas.noise(40))
        if rng.random() < 0.4:  # a check: wide pale bands both ways
            period = rng.uniform(12, 22)
            weave = sum(clamp(0.5 + 3 * np.sin(period * axis)) for axis in (canvas.x, canvas.y))
            surface = mix(surface, rgb("ffffff"), 0.12 * weave)
    else:
        surface = vary(rng, pick(rng, STONES)) * (1 + 0.05 * canvas.noise(5) + 0.03 * canvas.noise(22))
    canvas.pixels[:] = surface


def counter(canvas: Canvas, horizon: float) -> None:
    """A table seen from its side, and the wall behind it out of focus; `horizon` is where they meet."""
    rng = canvas.rng
    table(canvas)
    tilt = clamp((canvas.y - horizon) * 0.5)
    canvas.pixels *= 0.86 + 0.28 * tilt
    wall = vary(rng, pick(rng, WALLS)) * (1 + 0.07 * canvas.noise(2) - 0.1 * canvas.y)
    if rng.random() < 0.4:  # lights far away
        glow = ellipse(0, 0, 0.1)
        for cx, cy in rng.uniform((-1.1, -1.1), (1.1, horizon - 0.1), (4, 2)).tolist():
            wall = wall + 0.12 * clamp(0.5 - glow.distance(canvas.x - cx, canvas.y - cy) * 16)
    canvas.pixels += clamp(0.5 - (canvas.y - horizon) * 14) * (wall - canvas.pixels)


def plate(canvas: Canvas, cx: float, cy: float, radius: float, squash: float = 1.0) -> None:
    """A round plate, `squash` high for its width, as the camera's angle makes it."""
    rng = canvas.rng
    china = vary(rng, pick(rng, CHINA), 0.015)
    canvas.paint(ellipse(cx, cy, radius, radius * squash), china, bulge=0.08, shine=0.1, shadow=0.5, lift=0.1)
    if rng.random() < 0.35:
        ring = ellipse(cx, cy, 0.95 * radius, 0.95 * radius * squash)
        ring = ring - ellipse(cx, cy, 0.9 * radius, 0.9 * radius * squash)
        canvas.paint(ring, pick(rng, RIMS), alpha=0.8)
    inner = 0.76 * radius
    canvas.paint(ellipse(cx, cy, inner, inner * squash), china * 0.86)
    canvas.paint(ellipse(cx + 0.01, cy + 0.015, inner - 0.02, (inner - 0.02) * squash), china * 0.97)


def leaf(canvas: Canvas, cx: float, cy: float, length: float, angle: float, colour: np.ndarray = LEAF) -> None:
    """A pointed leaf, basil or mint: where two discs overlap."""
    c, s = math.cos(angle), math.sin(angle)
    radius, apart = 0.66 * length, 0.4 * length
    shape = ellipse(cx - apart * s, cy + apart * c, radius) & ellipse(cx + apart * s, cy - apart * c, radius)
    canvas.paint(shape, vary(canvas.rng, colour, 0.03), bulge=0.12, shine=0.15, shadow=0.4, lift=0.03)
    vein = [cx - 0.4 * length * c, cy - 0.4 * length * s, cx + 0.4 * length * c, cy + 0.4 * length * s]
    canvas.paint(capsules(vein, 0.008), colour * 1.5, alpha=0.5)


def berry(canvas: Canvas, cx: float, cy: float, radius: float, colour: np.ndarray) -> None:
    """A glossy ball: cherry, blueberry, raspberry."""
    shape = ellipse(cx, cy, radius)
    canvas.paint(shape, vary(canvas.rng, colour, 0.02), bulge=radius, shine=0.6, shadow=0.45, lift=0.05)


def strawberry(canvas: Canvas, cx: float, cy: float, size: float, angle: float) -> None:
    """A strawberry with its point at `angle` radians from straight down, seeds and green cap."""
    c, s = math.cos(angle), math.sin(angle)

    def place(u: float, v: float) -> tuple[float, float]:
        return cx + size * (c * u - s * v), cy + size * (s * u + c * v)

    top, tip = place(0, -0.25), place(0, 0.55)
    body = ellipse(*top, 0.62 * size, 0.55 * size, angle) | ellipse(*place(0, 0.1), 0.5 * size, 0.6 * size, angle)
    body = body | ellipse(*tip, 0.24 * size)
    canvas.paint(body, rgb("dd2433"), bulge=0.5 * size, shine=0.35, shadow=0.45, lift=0.05)
    seeds = [place(u, v) for u, v in [(-0.3, -0.2), (0, -0.3), (0.3, -0.2), (-0.16, 0.1), (0.16, 0.1), (0, 0.4)]]
    canvas.paint(dots(seeds, 0.045 * size), rgb("ffd98a"), alpha=0.9)
    for turn in (-0.75, 0.0, 0.75):
        root = place(0, -0.62)
        end = place(0.42 * math.sin(turn), -0.62 - 0.1 * math.cos(turn) + 0.15 * abs(turn))
        canvas.paint(capsules([*root, *end], 0.09 * size), LEAF, bulge=0.05)


def sprinkles(canvas: Canvas, places: np.ndarray, length: float, radius: float) -> None:
    """Short bright strokes at the places (N, 2), in three colours."""
    rng = canvas.rng
    turn = rng.uniform(0, math.pi, len(places))
    half = 0.5 * length * np.stack([np.cos(turn), np.sin(turn)], 1)
    strokes = np.concatenate([places - half, places + half], 1)
    for part, colour in zip(np.array_split(strokes, 3), rng.permutation(len(SPRINKLES)), strict=False):
        canvas.paint(capsules(part, radius), SPRINKLES[colour])


def scatter(rng: np.random.Generator, n: int, inner: float, outer: float) -> np.ndarray:
    """n places spread evenly over the ring between two radii, with no two on top of each other: (n, 2)."""
    turn = rng.uniform(0, 2 * math.pi) + 2.39996 * np.arange(n) + rng.normal(0, 0.15, n)  # golden angle
    share = (np.arange(n) + rng.uniform(0.2, 0.8, n)) / n
    radius = np.sqrt(inner**2 + share * (outer**2 - inner**2))
    return np.stack([radius * np.cos(turn), radius * np.sin(turn)], 1)
