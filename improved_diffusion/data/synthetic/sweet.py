"""Sweet dishes: each function paints one dish, a new one every time, onto an empty canvas."""

from __future__ import annotations

import math

import numpy as np

from improved_diffusion.data.synthetic.canvas import Canvas, clamp, mix, rgb
from improved_diffusion.data.synthetic.scene import (
    BLUEBERRY,
    CHERRY,
    CREAM,
    RASPBERRY,
    berry,
    counter,
    leaf,
    pick,
    plate,
    scatter,
    sprinkles,
    strawberry,
    table,
    vary,
)
from improved_diffusion.data.synthetic.shapes import (
    Shape,
    capsules,
    convex,
    cylinder,
    dots,
    ellipse,
    grid,
    rounded_box,
)

FLAVOURS = [rgb("f7b6c8"), rgb("f8efd6"), rgb("6d4128"), rgb("b5e2c0"), rgb("f6d06a"), rgb("9fc7ea"), rgb("b06a9c")]
PINK, CHOCOLATE = rgb("f27fae"), rgb("55301f")
ICINGS = [PINK, PINK, rgb("f7a8c4"), CHOCOLATE, CHOCOLATE, rgb("fbf3e6"), rgb("c3a5e4"), rgb("a5dccb")]
PASTELS = [rgb("f592b0"), rgb("aedd8c"), rgb("f9d764"), rgb("bd9fe8"), rgb("84cfe3"), rgb("a56f45"), rgb("f7a877")]
SKIES = [rgb("8ecae6"), rgb("f2d5bd"), rgb("bcd9c2"), rgb("5c8aa8"), rgb("e9e1d4")]


def creme_brulee(canvas: Canvas) -> None:
    """A fluted ramekin of custard under mottled burnt sugar; berries and mint, or a spoon's crack."""
    rng = canvas.rng
    table(canvas)
    radius, squash = rng.uniform(0.74, 0.88), rng.uniform(0.62, 0.98)
    ry, depth = radius * squash, 0.5 * (1 - squash) + 0.06
    top = -0.5 * depth
    china = vary(rng, pick(rng, [rgb("f5f3ef"), rgb("f5f3ef"), rgb("f0e4d0"), rgb("b9cfd8"), rgb("a8523a")]), 0.02)
    flutes = china * (0.84 + 0.1 * np.sin(canvas.x * rng.uniform(38, 46)))
    canvas.paint(cylinder(0, top, top + depth, radius, ry), flutes, bulge=0.12, shadow=0.6, lift=0.14)
    canvas.paint(ellipse(0, top, radius, ry), china, bulge=0.06, shine=0.2)
    bowl = 0.87 * radius
    canvas.paint(ellipse(0, top, bowl, bowl * squash), rgb("6d3714"))
    crust = vary(rng, pick(rng, [rgb("dd9430"), rgb("cf7d22"), rgb("e6a845")]), 0.03)
    sugar = mix(crust, rgb("f7cf71"), 0.8 * canvas.blotches(7, 0.3, 1.5))
    sugar = mix(sugar, rgb("6b2f0c"), 0.9 * canvas.blotches(7, rng.uniform(0.25, 0.42), 1.8))
    sugar = mix(sugar, rgb("45200c"), 0.8 * canvas.blotches(14, 0.16, 1.2))
    disc = ellipse(0, top + 0.01, 0.8 * radius, 0.8 * radius * squash)
    canvas.paint(disc, sugar, bulge=0.12, shine=0.25, mottle=0.06, cells=20, rough=0.008)
    gx, gy = 0.4 * radius * canvas.light[0], top + 0.4 * ry * canvas.light[1]
    canvas.paint(ellipse(gx, gy, 0.26, 0.13 * squash), rgb("fff3d0"), alpha=0.6 * canvas.blotches(12, 0.45))
    garnish = rng.random()
    if garnish < 0.4:
        gx, gy, size = rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2), rng.uniform(0.11, 0.15)
        first = rng.uniform(0, 3)
        for turn in (first, first + 1.1):
            leaf(canvas, gx + 0.2 * math.cos(turn), gy - 0.2 * math.sin(turn), 0.34, -turn)
        berry(canvas, gx - 0.1, gy + 0.04, size, pick(rng, [RASPBERRY, BLUEBERRY]))
        berry(canvas, gx + 0.12, gy + 0.06, size, RASPBERRY)
    elif garnish < 0.65:
        cx, cy, turn = rng.uniform(-0.3, 0.3), rng.uniform(-0.1, 0.3) * squash, rng.uniform(0, 3)
        canvas.paint(ellipse(cx, cy, 0.26, 0.2 * squash, turn), rgb("8a4513"), rough=0.03)
        canvas.paint(ellipse(cx, cy + 0.02, 0.21, 0.15 * squash, turn), rgb("f8e3a1"), bulge=0.1, rough=0.03)


def donuts(canvas: Canvas) -> None:
    """One iced ring from above, or two or three of them."""
    rng = canvas.rng
    table(canvas)
    if rng.random() < 0.4:
        plate(canvas, 0, 0, rng.uniform(1.0, 1.1))
    n = pick(rng, [1, 1, 1, 2, 3])
    radius, away = {1: (rng.uniform(0.72, 0.84), 0.0), 2: (0.56, 0.52), 3: (0.49, 0.54)}[n]
    start = rng.uniform(0, 2 * math.pi)
    for i in range(n):
        turn = start + 2 * math.pi * i / n
        _donut(canvas, away * math.cos(turn), away * math.sin(turn), radius)


def _donut(canvas: Canvas, cx: float, cy: float, radius: float) -> None:
    rng = canvas.rng
    hole = radius * rng.uniform(0.28, 0.34)
    middle, half = (radius + hole) / 2, (radius - hole) / 2
    dough = ellipse(cx, cy, radius) - ellipse(cx, cy, hole)
    canvas.paint(dough, vary(rng, rgb("cf8f45"), 0.03), bulge=half, mottle=0.04, shadow=0.6, lift=0.12)
    icing = ellipse(cx, cy, middle + 0.78 * half) - ellipse(cx, cy, middle - 0.72 * half)
    colour = vary(rng, pick(rng, ICINGS), 0.02)
    canvas.paint(icing, colour, bulge=0.7 * half, shine=0.35, rough=0.022 * radius / 0.7, cells=9)
    if rng.random() < 0.7:
        spots = scatter(rng, int(rng.integers(16, 26)), middle - 0.5 * half, middle + 0.5 * half) + (cx, cy)
        sprinkles(canvas, spots, 0.1 * radius, 0.032 * radius)
    elif rng.random() < 0.6:
        lines = [(cx + u, cy - radius, cx + u + 0.2, cy + radius) for u in np.linspace(-0.8, 0.6, 5) * radius]
        canvas.paint(capsules(lines, 0.025) & icing, pick(rng, [CREAM, rgb("5a2f1c")]))


def ice_cream(canvas: Canvas) -> None:
    """One to three scoops on a waffle cone, or three in a glass bowl."""
    rng = canvas.rng
    chosen = [vary(rng, FLAVOURS[i], 0.02) for i in rng.permutation(len(FLAVOURS))]
    if rng.random() < 0.65:
        canvas.pixels[:] = vary(rng, pick(rng, SKIES))
        canvas.pixels *= 1 + 0.05 * canvas.noise(3) - 0.08 * canvas.y
        _cone(canvas, chosen, pick(rng, [1, 1, 2, 3]))
        return
    counter(canvas, rng.uniform(-0.2, 0.2))
    glass = vary(rng, pick(rng, [rgb("dfe9ec"), rgb("f1efe9"), rgb("8fb7c4")]), 0.02)
    for (cx, cy), colour in zip([(-0.32, -0.12), (0.32, -0.14), (0.0, -0.3)], chosen, strict=False):
        _scoop(canvas, cx, cy, 0.4, colour)
    bowl = ellipse(0, 0.02, 0.82, 0.72) & rounded_box(0, 0.5, 1, 0.45)
    canvas.paint(rounded_box(0, 0.82, 0.3, 0.1, 0.05), glass * 0.85, bulge=0.1, shadow=0.4)
    canvas.paint(bowl, glass, bulge=0.35, shine=0.4)
    if rng.random() < 0.6:
        berry(canvas, 0, -0.7, 0.11, CHERRY)


def _cone(canvas: Canvas, flavours: list[np.ndarray], n: int) -> None:
    rng = canvas.rng
    size = {1: 0.56, 2: 0.44, 3: 0.36}[n]
    mouth, tip = {1: 0.0, 2: 0.12, 3: 0.22}[n], 1.08
    x, y, k = canvas.x, canvas.y, 24
    ridges = np.minimum(np.abs(np.sin(k * (x + 0.6 * y) / 2)), np.abs(np.sin(k * (x - 0.6 * y) / 2)))
    wafer = mix(rgb("a8672a"), vary(rng, rgb("e6ac5c"), 0.03), clamp(ridges * 3))
    width = 0.92 * size
    canvas.paint(convex([(-width, mouth), (width, mouth), (0.04, tip), (-0.04, tip)]), wafer, bulge=0.3)
    places = [(rng.uniform(-0.05, 0.05), mouth - 0.25 * size - 1.05 * size * i) for i in range(n)]
    for (cx, cy), colour in zip(places, flavours, strict=False):
        _scoop(canvas, cx, cy, size * (1 - 0.04 * (cy < -0.3)), colour)
    cx, cy = places[-1]
    if rng.random() < 0.4:
        berry(canvas, cx, cy - size - 0.04, 0.11, CHERRY)
    elif rng.random() < 0.6:
        sprinkles(canvas, scatter(rng, 14, 0, 0.75 * size) + (cx, cy - 0.15 * size), 0.08, 0.022)


def _scoop(canvas: Canvas, cx: float, cy: float, radius: float, colour: np.ndarray) -> None:
    turn = np.linspace(0.15, math.pi - 0.15, 6)
    skirt = np.stack([cx + 0.92 * radius * np.cos(turn), cy + 0.45 * radius + 0.3 * radius * np.sin(turn)], 1)
    canvas.paint(dots(skirt, 0.24 * radius), colour * 0.96, bulge=0.2 * radius, rough=0.012, shadow=0.35, lift=0.06)
    canvas.paint(ellipse(cx, cy, radius), colour, bulge=radius, shine=0.2, mottle=0.05, rough=0.015, cells=16)


def macarons(canvas: Canvas) -> None:
    """Pastel almond shells, two around a filling: in a tower, a pyramid, a pair or a row."""
    rng = canvas.rng
    counter(canvas, rng.uniform(-0.5, 0.2))
    colours = [vary(rng, PASTELS[i], 0.02) for i in rng.permutation(len(PASTELS))]
    layout = pick(rng, ["tower", "pyramid", "pair", "row"])
    if layout == "tower":
        places, size = [(rng.uniform(-0.08, 0.08), 0.6 - 0.58 * i) for i in range(3)], 0.5
    elif layout == "pyramid":
        places, size = [(-0.46, 0.48), (0.46, 0.48), (0.0, -0.08)], 0.46
    elif layout == "pair":
        places, size = [(rng.uniform(-0.06, 0.06), 0.42), (rng.uniform(-0.1, 0.1), -0.36)], 0.68
    else:
        places, size = [(-0.45, rng.uniform(0.0, 0.15)), (0.4, rng.uniform(0.3, 0.42))], 0.6
    for (cx, cy), colour in zip(places, colours, strict=False):
        _macaron(canvas, cx, cy, size, colour)


def _macaron(canvas: Canvas, cx: float, cy: float, size: float, colour: np.ndarray) -> None:
    rng = canvas.rng
    tilt = rng.uniform(-0.1, 0.1)
    c, s = size * math.cos(tilt), size * math.sin(tilt)
    filling = pick(rng, [CREAM, rgb("7a4a2c"), mix(colour, rgb("c02050"), 0.5)])

    def slab(v: float, wide: float, high: float) -> Shape:
        return rounded_box(cx - s * v, cy + c * v, wide * size, high * size, 0, tilt)

    def shell(sign: int) -> None:
        dome = rounded_box(cx - 0.06 * sign * s, cy + 0.06 * sign * c, 0.96 * size, 0.56 * size, 0.5 * size, tilt)
        half = canvas.cover(slab(0.5 * sign, 1.1, 0.4))
        canvas.paint(dome, colour, alpha=half, bulge=0.5 * size, shine=0.3, shadow=0.4 + 0.2 * sign, lift=0.08)
        u, v = np.linspace(-0.9, 0.9, 15), 0.16 * sign + rng.uniform(-0.015, 0.015, 15)  # the ruffled foot
        foot = np.stack([cx + c * u - s * v, cy + s * u + c * v], 1)
        canvas.paint(dots(foot, 0.09 * size), mix(colour, CREAM, 0.2), bulge=0.05 * size)

    shell(1)
    canvas.paint(slab(0, 0.9, 0.1), filling, bulge=0.1 * size, shadow=0.3, lift=0.03)
    shell(-1)


def pancakes(canvas: Canvas) -> None:
    """A stack seen at an angle, butter melting on top, syrup running down."""
    rng = canvas.rng
    table(canvas)
    n, rx, ry = pick(rng, [3, 4, 5]), rng.uniform(0.66, 0.76), rng.uniform(0.26, 0.36)
    thick = rng.uniform(0.15, 0.19)
    bottom = 0.2 + 0.5 * n * thick
    plate(canvas, 0, bottom - 0.02, 1.05, 0.5)
    brown = vary(rng, rgb("b8702c"), 0.03)
    for i in range(n):
        cx, cy = rng.uniform(-0.04, 0.04), bottom - thick * (i + 1)
        side = cylinder(cx, cy, cy + 0.8 * thick, rx, ry)
        canvas.paint(side, vary(rng, rgb("efcd8a"), 0.02), bulge=0.08, shadow=0.3, lift=0.06, mottle=0.03)
        canvas.paint(ellipse(cx, cy, rx - 0.015, ry - 0.01), brown, bulge=0.07, mottle=0.08, cells=7)
    syrup = rgb("8a4210")
    pool = ellipse(0, cy + 0.02, 0.62 * rx, 0.62 * ry)
    for u in rng.permutation([-0.55, -0.2, 0.15, 0.5])[:3].tolist():
        u *= rx
        edge = cy + ry * math.sqrt(1 - (u / rx) ** 2)
        run = rng.uniform(0.1, 0.8) * n * thick
        pool = pool | capsules([0.8 * u, cy, u, edge], 0.055) | capsules([u, edge, u, edge + run], 0.05)
    canvas.paint(pool, syrup, bulge=0.07, shine=0.5, alpha=0.88, rough=0.01)
    topping = rng.random()
    if topping < 0.65:
        turn = rng.uniform(-0.5, 0.5)
        canvas.paint(rounded_box(0, cy - 0.01, 0.19, 0.11, 0.03, turn), rgb("f0cf5e"), shadow=0.3, lift=0.04)
        canvas.paint(rounded_box(0, cy - 0.06, 0.18, 0.1, 0.03, turn), rgb("fdeb9c"), bulge=0.05, shine=0.2)
    if topping > 0.45:
        fruit = pick(rng, [BLUEBERRY, RASPBERRY])
        for side in (-1, 1):
            berry(canvas, side * rng.uniform(0.25, 0.42), cy + rng.uniform(-0.1, 0.1), 0.1, fruit)


def waffles(canvas: Canvas) -> None:
    """A round or square waffle from above, its grid of pits, butter or cream, berries."""
    rng = canvas.rng
    table(canvas)
    plate(canvas, 0, 0, rng.uniform(1.02, 1.12), rng.uniform(0.85, 1.0))
    turn, size = rng.uniform(-0.6, 0.6), rng.uniform(0.68, 0.78)
    square = rng.random() < 0.5

    def outline(inset: float) -> Shape:
        if square:
            return rounded_box(0, 0, 0.9 * size - inset, 0.9 * size - inset, 0.1, turn)
        return ellipse(0, 0, size - inset)

    dough = vary(rng, pick(rng, [rgb("dd9f4a"), rgb("cf8b38"), rgb("e7b465")]), 0.03)
    canvas.paint(outline(0), dough, bulge=0.1, mottle=0.05, shadow=0.6, lift=0.1)
    pitch = rng.uniform(0.26, 0.34)
    pits = outline(0.08) & grid(pitch, 0.35 * pitch, turn)
    canvas.paint(pits, dough * 0.5)
    floor = grid(pitch, 0.35 * pitch, turn, -0.04 * canvas.light[0], -0.04 * canvas.light[1])
    syrup = rgb("8f4a12") if rng.random() < 0.4 else dough * 0.8
    canvas.paint(pits & floor, syrup)
    topping = rng.random()
    if topping < 0.4:
        canvas.paint(rounded_box(0, 0, 0.2, 0.17, 0.04, turn + 0.4), rgb("fdeb9c"), bulge=0.07, shine=0.2, shadow=0.4)
    elif topping < 0.7:
        canvas.paint(dots(scatter(rng, 6, 0.12, 0.2), 0.17), CREAM, bulge=0.15, shadow=0.4)
        strawberry(canvas, 0, -0.05, 0.24, rng.uniform(-0.6, 0.6))
    else:
        for cx, cy in scatter(rng, 5, 0.1, 0.5).tolist():
            berry(canvas, cx, cy, 0.11, pick(rng, [BLUEBERRY, RASPBERRY]))
