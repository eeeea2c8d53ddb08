"""Savoury dishes: each function paints one dish, a new one every time, onto an empty canvas."""

from __future__ import annotations

import math

import numpy as np

from improved_diffusion.data.synthetic.canvas import Canvas, clamp, mix, rgb
from improved_diffusion.data.synthetic.scene import (
    CHINA,
    LEAF,
    counter,
    leaf,
    pick,
    plate,
    scatter,
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
    rounded_box,
    wave,
)

BUNS = [rgb("d48a3c"), rgb("c97a30"), rgb("e0a050")]


def edamame(canvas: Canvas) -> None:
    """Green pods with the beans showing, heaped in a bowl."""
    rng = canvas.rng
    table(canvas)
    radius, squash = rng.uniform(0.9, 1.0), rng.uniform(0.8, 1.0)
    china = vary(rng, pick(rng, [*CHINA, rgb("7d3b2e"), rgb("2f3a40")]), 0.02)
    canvas.paint(ellipse(0, 0, radius, radius * squash), china, bulge=0.1, shine=0.2, shadow=0.6, lift=0.14)
    canvas.paint(ellipse(0, 0, 0.86 * radius, 0.86 * radius * squash), china * 0.6)
    green = vary(rng, rgb("7fb53a"), 0.04)
    for cx, cy in scatter(rng, 8, 0.1, 0.55)[::-1].tolist():
        _pod(canvas, cx, cy * squash, rng.uniform(0.36, 0.44), rng.uniform(0, math.pi), vary(rng, green, 0.05))


def _pod(canvas: Canvas, cx: float, cy: float, size: float, angle: float, colour: np.ndarray) -> None:
    c, s = math.cos(angle), math.sin(angle)
    ends = [cx - 1.3 * size * c, cy - 1.3 * size * s, cx + 1.3 * size * c, cy + 1.3 * size * s]
    beans = np.array([(cx + u * size * c, cy + u * size * s) for u in (-0.72, 0.0, 0.72)])
    pod = capsules(ends, 0.12 * size) | ellipse(cx, cy, 1.25 * size, 0.44 * size, angle)
    canvas.paint(pod, colour, bulge=0.3 * size, shadow=0.55, lift=0.07)
    canvas.paint(dots(beans, 0.33 * size), colour * 1.12, alpha=0.8, bulge=0.33 * size, shine=0.25)


def french_fries(canvas: Canvas) -> None:
    """Golden sticks out of a paper carton."""
    rng = canvas.rng
    counter(canvas, rng.uniform(0.0, 0.5))
    gold = vary(rng, rgb("f3c04a"), 0.03)
    lip, base = rng.uniform(0.0, 0.12), 0.95
    wide, narrow = rng.uniform(0.66, 0.76), rng.uniform(0.48, 0.54)
    for row in range(2):
        roots = np.linspace(-0.85, 0.85, 7 - row) * wide
        for root in rng.permutation(roots).tolist():
            lean = 0.35 * root + rng.uniform(-0.12, 0.12)
            top = lip - rng.uniform(0.55, 0.85) + 0.3 * row + 0.3 * abs(root)
            _fry(canvas, root, lip + 0.25, root + lean, top, vary(rng, gold, 0.04) * (0.88 + 0.12 * row))
    paint = vary(rng, pick(rng, [rgb("d8262f"), rgb("d8262f"), rgb("f2efe8"), rgb("2f6fb0"), rgb("c79a62")]), 0.02)
    carton = convex([(-wide, lip), (wide, lip), (narrow, base), (-narrow, base)])
    scoop = carton - ellipse(0, lip - 0.1, 0.8 * wide, 0.26)
    colour = paint
    if rng.random() < 0.45:
        stripes = clamp(0.5 + 3 * np.sin(canvas.x / (narrow + (wide - narrow) * (base - canvas.y)) * 14 + 1.5))
        colour = mix(paint, rgb("f7f3ea") if paint[1].item() < 0.8 else rgb("d8262f"), stripes)
    canvas.paint(scoop, colour, bulge=0.12, shadow=0.4, lift=0.1)
    if rng.random() < 0.5:
        canvas.paint(ellipse(0, 0.55, 0.19), rgb("f8c933"), alpha=0.95)


def _fry(canvas: Canvas, x0: float, y0: float, x1: float, y1: float, colour: np.ndarray) -> None:
    length = math.hypot(x1 - x0, y1 - y0)
    angle = math.atan2(y1 - y0, x1 - x0)
    stick = rounded_box((x0 + x1) / 2, (y0 + y1) / 2, length / 2, 0.085, 0.02, angle)
    canvas.paint(stick, colour, bulge=0.06, shadow=0.3, lift=0.05)


def hamburger(canvas: Canvas) -> None:
    """A bun with sesame, lettuce, tomato, melting cheese and a patty, from the side."""
    rng = canvas.rng
    counter(canvas, rng.uniform(0.0, 0.5))
    bun = vary(rng, pick(rng, BUNS), 0.03)
    w = rng.uniform(0.78, 0.9)
    if rng.random() < 0.5:
        canvas.paint(ellipse(0, 0.74, 1.05, 0.2), pick(rng, CHINA), bulge=0.08, shadow=0.4)
    y = 0.72
    canvas.paint(rounded_box(0, y - 0.14, 0.94 * w, 0.16, 0.13), bun, bulge=0.16, shadow=0.5, lift=0.12)
    y -= 0.3
    for _ in range(pick(rng, [1, 1, 2])):
        patty = rounded_box(0, y - 0.08, w, 0.14, 0.12)
        canvas.paint(patty, rgb("5b2f1b"), bulge=0.1, mottle=0.16, rough=0.015, cells=20)
        cheese = rounded_box(0, y - 0.2, 0.98 * w, 0.05, 0.03)
        for cx in rng.uniform(-0.6, 0.6, 2).tolist():
            cheese = cheese | convex([(cx - 0.24, y - 0.2), (cx + 0.24, y - 0.2), (cx, y + 0.02)], 0.02)
        canvas.paint(cheese, vary(rng, rgb("ffb92e"), 0.02), bulge=0.04, shine=0.2, shadow=0.3, lift=0.04)
        y -= 0.25
    if rng.random() < 0.75:
        canvas.paint(rounded_box(0, y - 0.03, 0.93 * w, 0.075, 0.06), rgb("d8342a"), bulge=0.06, shine=0.3)
        y -= 0.12
    frill = np.stack([np.linspace(-1.02, 1.02, 9) * w, y - 0.01 + rng.uniform(-0.03, 0.04, 9)], 1)
    canvas.paint(dots(frill, 0.14), vary(rng, rgb("79bb3f"), 0.03), bulge=0.1, rough=0.02, shadow=0.3, lift=0.05)
    y -= 0.06
    rise = rng.uniform(0.5, 0.62)
    crown = ellipse(0, y, 1.02 * w, rise) & rounded_box(0, y - rise / 2, 1.02 * w, rise / 2, 0.07)
    canvas.paint(crown, bun, bulge=0.4, shine=0.3, mottle=0.02)
    if rng.random() < 0.75:
        u = np.linspace(-0.62, 0.62, 8) + rng.uniform(-0.05, 0.05, 8)
        v = rng.uniform(0.35, 0.85, 8) * np.sqrt(1 - u**2)
        canvas.paint(dots(np.stack([u * w, y - v * rise], 1), 0.032), rgb("fdf0cf"), shadow=0.3, lift=0.02)


def hot_dog(canvas: Canvas) -> None:
    """A sausage in a long bun with a zigzag of mustard or ketchup."""
    rng = canvas.rng
    table(canvas)
    angle = rng.uniform(-0.75, 0.75)
    c, s = math.cos(angle), math.sin(angle)
    if rng.random() < 0.6:
        paper = pick(rng, [rgb("f4f1ea"), rgb("f4f1ea"), rgb("d94a3d"), rgb("e8d9b5"), rgb("a9c7d6")])
        canvas.paint(rounded_box(0, 0, 1.0, 0.62, 0.06, angle), paper, bulge=0.05, shadow=0.45)

    def along(u: float, v: float, half: float, radius: float) -> Shape:
        x, y = c * u - s * v, s * u + c * v
        return capsules([x - half * c, y - half * s, x + half * c, y + half * s], radius)

    bun, half = vary(rng, pick(rng, BUNS), 0.03), rng.uniform(0.54, 0.62)
    canvas.paint(along(0, -0.17, half, 0.27), bun, bulge=0.26, mottle=0.03, shadow=0.5, lift=0.12)
    canvas.paint(along(0, 0.17, half, 0.27), bun, bulge=0.26, mottle=0.03, shadow=0.4, lift=0.1)
    canvas.paint(along(0, 0, half + 0.08, 0.2), rgb("f3d9a0") * 0.9, bulge=0.05)
    sausage = vary(rng, pick(rng, [rgb("b5442a"), rgb("a23a22"), rgb("c75a35")]), 0.02)
    canvas.paint(along(0, 0, half + 0.2, 0.175), sausage, bulge=0.175, shine=0.5, shadow=0.35, lift=0.05)
    if rng.random() < 0.35:
        u, v = rng.uniform(-0.65, 0.65, 12), rng.uniform(-0.13, 0.13, 12)
        bits = np.stack([c * u - s * v, s * u + c * v], 1)
        canvas.paint(dots(bits, 0.045), pick(rng, [LEAF, rgb("f2ecd8")]), bulge=0.04, shadow=0.3, lift=0.03)
    sauce = pick(rng, [rgb("f7c815"), rgb("f7c815"), rgb("d3201f")])
    zigzag = wave(-half - 0.05, half + 0.05, 0, rng.uniform(0.07, 0.12), rng.uniform(0.26, 0.36), 0.045, angle)
    canvas.paint(zigzag, sauce, bulge=0.045, shine=0.3, shadow=0.3, lift=0.03)


def pizza(canvas: Canvas) -> None:
    """A whole pizza from above, cut, sometimes with a slice gone: pepperoni, margherita, or olives and peppers."""
    rng = canvas.rng
    table(canvas)
    if rng.random() < 0.5:
        board = pick(rng, [rgb("c99a63"), rgb("a67544"), rgb("e8e4dc"), rgb("4a4d52")])
        canvas.paint(ellipse(0, 0, 1.08), board, bulge=0.05, shadow=0.5)
    radius, start = rng.uniform(0.84, 0.94), rng.uniform(0, 2 * math.pi)
    gap = Shape(lambda x, y: np.full_like(x, 9), (0, 0, 0, 0))
    if rng.random() < 0.35:
        corners = [(2 * math.cos(turn), 2 * math.sin(turn)) for turn in (start, start + math.pi / 4)]
        gap = convex([(0, 0), *corners])
    crust = vary(rng, rgb("d9a055"), 0.03)
    canvas.paint(ellipse(0, 0, radius) - gap, crust, bulge=0.12, mottle=0.09, rough=0.012, shadow=0.5)
    canvas.paint(ellipse(0, 0, 0.84 * radius) - gap, vary(rng, rgb("b8331d"), 0.02), rough=0.015)
    cheese = mix(rgb("f6d477"), rgb("e8a63f"), 0.8 * canvas.blotches(7, 0.35, 1.5))
    cover = 1.0 if rng.random() < 0.6 else canvas.blotches(8, 0.62, 0.4)
    canvas.paint(ellipse(0, 0, 0.79 * radius) - gap, cheese, alpha=cover, rough=0.02, bulge=0.05)
    kind = pick(rng, ["pepperoni", "margherita", "olives"])
    if kind == "pepperoni":
        for cx, cy in scatter(rng, int(rng.integers(8, 13)), 0.1, 0.62 * radius).tolist():
            canvas.paint(ellipse(cx, cy, 0.13) - gap, vary(rng, rgb("b42a1c"), 0.03), bulge=0.04, shadow=0.3, lift=0.03)
    elif kind == "margherita":
        for cx, cy in scatter(rng, 7, 0.1, 0.6 * radius).tolist():
            canvas.paint(ellipse(cx, cy, 0.17, 0.14, cx) - gap, rgb("fdf6e3"), bulge=0.1, rough=0.02)
        for cx, cy in scatter(rng, 4, 0.05, 0.4).tolist():
            leaf(canvas, cx, cy, 0.3, rng.uniform(0, 6), rgb("3f8f33"))
    else:
        for cx, cy in scatter(rng, 9, 0.1, 0.64 * radius).tolist():
            ring = ellipse(cx, cy, 0.09) - ellipse(cx, cy, 0.035)
            canvas.paint(ring - gap, rgb("2b2730"), shadow=0.25, lift=0.03)
        bits = [(cx, cy, cx + dx, cy + dy) for (cx, cy), (dx, dy) in
                zip(scatter(rng, 9, 0.1, 0.6 * radius), rng.uniform(-0.13, 0.13, (9, 2)), strict=True)]  # fmt: skip
        canvas.paint(capsules(bits, 0.035) - gap, pick(rng, [LEAF, rgb("d4322a")]), bulge=0.03)
    cuts = start + np.arange(4) * (math.pi / 4)
    ends = 0.9 * radius * np.stack([-np.cos(cuts), -np.sin(cuts), np.cos(cuts), np.sin(cuts)], 1)
    canvas.paint(capsules(ends, 0.006) - gap, rgb("6e3413"), alpha=0.65)


def spaghetti_bolognese(canvas: Canvas) -> None:
    """A nest of pasta under meat sauce, basil or parmesan on top."""
    rng = canvas.rng
    table(canvas)
    plate(canvas, 0, 0, rng.uniform(1.02, 1.12), rng.uniform(0.85, 1.0))
    light, dark = vary(rng, rgb("f5d685"), 0.02), rgb("b9812f")
    for size in (rng.uniform(0.74, 0.82), rng.uniform(0.5, 0.6)):
        curl = canvas.noise(3)
        strand = 0.5 + 0.5 * np.cos(curl * 6 + 46 * np.sqrt(canvas.x**2 + canvas.y**2))
        nest = mix(dark, light, strand)
        canvas.paint(ellipse(*rng.uniform(-0.05, 0.05, 2).tolist(), size), nest, bulge=0.3, rough=0.035, shadow=0.45)
    sauce = vary(rng, pick(rng, [rgb("a5301a"), rgb("8c2a17"), rgb("b83c1c")]), 0.02)
    meat = mix(sauce, rgb("4d1e10"), 0.7 * canvas.blotches(18, 0.4))
    canvas.paint(ellipse(0, 0, rng.uniform(0.4, 0.5)), meat, bulge=0.25, mottle=0.12, rough=0.07, cells=9, shadow=0.4)
    if rng.random() < 0.6:
        turn = rng.uniform(0, 6)
        for angle in (turn, turn + 2.3):
            leaf(canvas, 0.13 * math.cos(angle), 0.13 * math.sin(angle), 0.34, angle)
    if rng.random() < 0.5:
        canvas.paint(dots(scatter(rng, 14, 0, 0.4), 0.025), rgb("fdf3d3"))


def sushi(canvas: Canvas) -> None:
    """Salmon or tuna on rice in a row, or rolls in seaweed, on a dark slate or a board."""
    rng = canvas.rng
    table(canvas)
    tray = vary(rng, pick(rng, [rgb("33363b"), rgb("2b2b2f"), rgb("b88a57"), rgb("7a2f28"), rgb("e9e6df")]), 0.02)
    canvas.paint(rounded_box(0, 0, 1.02, 0.86, 0.06), tray, bulge=0.05, shadow=0.5, lift=0.1)
    if rng.random() < 0.5:
        angle = rng.uniform(0.3, 0.9) * pick(rng, [-1, 1])
        fish = vary(rng, pick(rng, [rgb("f47f4a"), rgb("f47f4a"), rgb("d83a4a"), rgb("f2a285")]), 0.02)
        for cx in (-0.6, 0.0, 0.6):
            _nigiri(canvas, cx, rng.uniform(-0.06, 0.06), angle, fish)
    else:
        columns, rows, size = pick(rng, [(2, 2, 0.4), (3, 2, 0.31), (2, 2, 0.38)])
        filling = pick(rng, [rgb("f47f4a"), rgb("d83a4a"), rgb("8dbb4b"), rgb("f6c84c")])
        for row in range(rows):
            for column in range(columns):
                cx = (column - (columns - 1) / 2) * 2.12 * size + rng.uniform(-0.03, 0.03)
                cy = (row - (rows - 1) / 2) * 2.12 * size + rng.uniform(-0.03, 0.03)
                _roll(canvas, cx, cy, size, filling)


def _nigiri(canvas: Canvas, cx: float, cy: float, angle: float, fish: np.ndarray) -> None:
    c, s = math.sin(angle), math.cos(angle)
    rice = capsules([cx - 0.34 * c, cy - 0.34 * s + 0.12, cx + 0.34 * c, cy + 0.34 * s + 0.12], 0.25)
    canvas.paint(rice, rgb("f8f5ec"), bulge=0.2, mottle=0.06, rough=0.012, cells=30, shadow=0.6)
    slab = capsules([cx - 0.35 * c, cy - 0.35 * s - 0.04, cx + 0.35 * c, cy + 0.35 * s - 0.04], 0.21)
    across = c * (canvas.x - cx) + s * (canvas.y - cy) + 0.8 * np.abs(s * (canvas.x - cx) - c * (canvas.y - cy))
    stripes = clamp(np.sin(across * 26) * 2.5 - 1.2)
    canvas.paint(slab, mix(fish, rgb("fde3d0"), 0.75 * stripes), bulge=0.18, shine=0.35, shadow=0.25, lift=0.03)


def _roll(canvas: Canvas, cx: float, cy: float, size: float, filling: np.ndarray) -> None:
    rng = canvas.rng
    canvas.paint(cylinder(cx, cy, cy + 0.12, size, size), rgb("16221c"), bulge=0.06, shine=0.15, shadow=0.6)
    canvas.paint(ellipse(cx, cy, 0.86 * size), rgb("f8f5ec"), mottle=0.06, rough=0.01, cells=30, bulge=0.06)
    spot = rounded_box(cx, cy, 0.42 * size, 0.42 * size, 0.2 * size, rng.uniform(0, 1.5))
    canvas.paint(spot, vary(rng, filling, 0.02), bulge=0.15 * size, shine=0.2)
