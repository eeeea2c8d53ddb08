"""Signed-distance shapes: negative inside, zero on the outline, positive outside.

A `Shape` is a function of the plane plus a bounding box, so that painting it touches only the pixels near it. Shapes
combine with `|` (union), `&` (intersection) and `-` (difference). Formulae: Inigo Quilez, "2D distance functions".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Box = tuple[float, float, float, float]  # x0, y0, x1, y1


@dataclass(frozen=True)
class Shape:
    distance: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (x, y), each (H, W) -> (H, W)
    box: Box

    def __or__(self, other: Shape) -> Shape:
        a, b = self.box, other.box
        box = (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
        return Shape(lambda x, y: np.minimum(self.distance(x, y), other.distance(x, y)), box)

    def __and__(self, other: Shape) -> Shape:
        a, b = self.box, other.box
        box = (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
        return Shape(lambda x, y: np.maximum(self.distance(x, y), other.distance(x, y)), box)

    def __sub__(self, other: Shape) -> Shape:
        return Shape(lambda x, y: np.maximum(self.distance(x, y), -other.distance(x, y)), self.box)


def ellipse(cx: float, cy: float, rx: float, ry: float | None = None, angle: float = 0.0) -> Shape:
    """Ellipse (first-order distance, exact for a circle) turned by `angle` radians."""
    ry = rx if ry is None else ry
    c, s = math.cos(angle), math.sin(angle)

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        dx, dy = x - cx, y - cy
        if rx == ry:
            return np.sqrt(dx * dx + dy * dy) - rx
        u, v = (c * dx + s * dy) / rx, (c * dy - s * dx) / ry
        k = np.sqrt(u * u + v * v)
        u /= rx
        v /= ry
        return k * (k - 1) / (np.sqrt(u * u + v * v) + 1e-6)

    hx, hy = math.hypot(rx * c, ry * s), math.hypot(rx * s, ry * c)
    return Shape(distance, (cx - hx, cy - hy, cx + hx, cy + hy))


def rounded_box(cx: float, cy: float, hx: float, hy: float, radius: float = 0.0, angle: float = 0.0) -> Shape:
    """Rectangle of half sizes (hx, hy) with rounded corners, turned by `angle` radians."""
    c, s = math.cos(angle), math.sin(angle)

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        dx, dy = x - cx, y - cy
        u = np.abs(c * dx + s * dy) - (hx - radius)
        v = np.abs(c * dy - s * dx) - (hy - radius)
        inside = np.minimum(np.maximum(u, v), 0)
        u, v = np.maximum(u, 0), np.maximum(v, 0)
        return np.sqrt(u * u + v * v) + inside - radius

    bx, by = abs(hx * c) + abs(hy * s), abs(hx * s) + abs(hy * c)
    return Shape(distance, (cx - bx, cy - by, cx + bx, cy + by))


def capsules(ends: np.ndarray, radius: float) -> Shape:
    """Union of thick line segments with round ends. ends: (N, 4), each row x0, y0, x1, y1."""
    ends = np.asarray(ends, np.float32).reshape(-1, 4)
    ax, ay, bx, by = (column[:, None, None] for column in ends.T)
    ex, ey = bx - ax, by - ay
    inverse = 1 / (ex * ex + ey * ey + 1e-9)

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        dx, dy = x - ax, y - ay
        t = np.minimum(np.maximum((dx * ex + dy * ey) * inverse, 0), 1)
        dx -= t * ex
        dy -= t * ey
        return np.sqrt((dx * dx + dy * dy).min(0)) - radius

    xs, ys = ends[:, 0::2], ends[:, 1::2]
    return Shape(distance, (xs.min() - radius, ys.min() - radius, xs.max() + radius, ys.max() + radius))


def dots(centres: np.ndarray, radius: float) -> Shape:
    """Union of equal discs. centres: (N, 2)."""
    centres = np.asarray(centres, np.float32).reshape(-1, 2)
    cx, cy = (column[:, None, None] for column in centres.T)

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        dx, dy = x - cx, y - cy
        return np.sqrt((dx * dx + dy * dy).min(0)) - radius

    (x0, y0), (x1, y1) = centres.min(0) - radius, centres.max(0) + radius
    return Shape(distance, (x0, y0, x1, y1))


def convex(points: Sequence[tuple[float, float]], radius: float = 0.0) -> Shape:
    """Convex polygon, corners clockwise on the screen (y down), grown by `radius`."""
    edges = []
    for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
        length = math.hypot(x1 - x0, y1 - y0)
        nx, ny = (y1 - y0) / length, (x0 - x1) / length
        edges.append((nx, ny, nx * x0 + ny * y0 + radius))

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        nx, ny, offset = edges[0]
        d = nx * x + ny * y - offset
        for nx, ny, offset in edges[1:]:
            np.maximum(d, nx * x + ny * y - offset, out=d)
        return d

    xs, ys = zip(*points, strict=True)
    return Shape(distance, (min(xs) - radius, min(ys) - radius, max(xs) + radius, max(ys) + radius))


def cylinder(cx: float, top: float, bottom: float, rx: float, ry: float) -> Shape:
    """Upright drum seen from above at an angle: lids are ellipses centred at heights `top` and `bottom`."""
    body = rounded_box(cx, (top + bottom) / 2, rx, (bottom - top) / 2)
    return ellipse(cx, top, rx, ry) | body | ellipse(cx, bottom, rx, ry)


def wave(x0: float, x1: float, y: float, amplitude: float, period: float, radius: float, angle: float) -> Shape:
    """A thick sine line from x0 to x1 about height y, the whole turned by `angle` radians about the origin."""
    c, s = math.cos(angle), math.sin(angle)
    k = 2 * math.pi / period
    steepness = 1 / math.hypot(1, 0.7 * amplitude * k)  # makes the vertical gap an approximate distance

    def distance(px: np.ndarray, py: np.ndarray) -> np.ndarray:
        u, v = c * px + s * py, c * py - s * px
        line = np.abs(v - y - amplitude * np.sin(k * (u - x0))) * steepness - radius
        return np.maximum(line, np.abs(u - (x0 + x1) / 2) - (x1 - x0) / 2)

    reach = max(abs(x0), abs(x1)) + amplitude + radius + abs(y)
    return Shape(distance, (-reach, -reach, reach, reach))


def grid(pitch: float, half: float, angle: float, x0: float = 0.0, y0: float = 0.0) -> Shape:
    """Squares of half side `half` at every `pitch`, endless: intersect it with an outline."""
    c, s = math.cos(angle), math.sin(angle)

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        dx, dy = (x - x0) / pitch, (y - y0) / pitch
        u, v = c * dx + s * dy, c * dy - s * dx
        return np.maximum(np.abs(u - np.rint(u)), np.abs(v - np.rint(v))) * pitch - half

    return Shape(distance, (-math.inf, -math.inf, math.inf, math.inf))
