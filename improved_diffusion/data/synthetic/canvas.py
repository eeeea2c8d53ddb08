"""A small painter: shapes go onto a 64x64 picture one over another, antialiased, rounded, lit, and casting shadows.

World coordinates: x to the right, y down, about -1..1 across the picture. Colours are sRGB in 0..1. Arrays are float32
and channel-first inside; `Canvas.develop` returns the usual uint8 (H, W, 3).
"""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

import numpy as np

from improved_diffusion.data.synthetic.shapes import Box, Shape

SIZE = 64


def rgb(hexadecimal: str) -> np.ndarray:
    """ "f2c14e" -> (3, 1, 1) float32 in 0..1."""
    return (np.frombuffer(bytes.fromhex(hexadecimal), np.uint8) / np.float32(255)).reshape(3, 1, 1)


def mix(a: np.ndarray, b: np.ndarray, t: float | np.ndarray) -> np.ndarray:
    """Linear blend: a at t = 0, b at t = 1. An (H, W) `t` gives a (3, H, W) colour field."""
    return a + (b - a) * t


def clamp(x: np.ndarray) -> np.ndarray:
    """x limited to 0..1; several times faster than `np.clip` on arrays this small."""
    return np.minimum(np.maximum(x, 0), 1)


@functools.cache
def _spline_basis(cells: int) -> np.ndarray:
    """Uniform cubic B-spline weights that stretch cells + 3 random knots over SIZE pixels: (SIZE, cells + 3)."""
    position = (np.arange(SIZE) + 0.5) / SIZE * cells
    distance = np.abs(position[:, None] + 1 - np.arange(cells + 3))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    basis = np.where(distance < 1, near, far)
    return (basis / np.sqrt((basis**2).sum(1).mean())).astype(np.float32)  # unit variance noise


class Canvas:
    """A picture in the making: its camera (zoom, roll, shift), its light, its pixels (3, SIZE, SIZE)."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.zoom = rng.uniform(0.94, 1.14)
        self.roll = rng.uniform(-0.09, 0.09)
        self.shift = rng.uniform(-0.08, 0.08, 2).tolist()
        self.pixel = 2 * self.zoom / SIZE  # side of a pixel in world units

        centres = (np.arange(SIZE, dtype=np.float32) + 0.5) * (2 / SIZE) - 1
        column, row = centres[None, :] * self.zoom, centres[:, None] * self.zoom
        c, s = math.cos(self.roll), math.sin(self.roll)
        self.x = c * column - s * row + self.shift[0]
        self.y = s * column + c * row + self.shift[1]

        azimuth, height = rng.uniform(-2.6, -0.54), rng.uniform(0.55, 0.8)
        flat = math.sqrt(1 - height**2)
        self.light = (flat * math.cos(azimuth), flat * math.sin(azimuth), height)  # towards the lamp; z to the viewer
        self.pixels = np.zeros((3, SIZE, SIZE), np.float32)

    def noise(self, cells: int, cells_down: int | None = None) -> np.ndarray:
        """Smooth random field, mean 0, deviation about 1, `cells` bumps across and `cells_down` down: (SIZE, SIZE)."""
        across, down = _spline_basis(cells), _spline_basis(cells_down or cells)
        knots = self.rng.standard_normal((down.shape[1], across.shape[1]), dtype=np.float32)
        return down @ knots @ across.T

    def blotches(self, cells: int, cover: float = 0.5, softness: float = 0.5) -> np.ndarray:
        """Patches of opacity in 0..1, `cover` of them half opaque or more: (SIZE, SIZE)."""
        level = NormalDist().inv_cdf(cover)
        return clamp(0.5 + (self.noise(cells) + level) / softness)

    def cover(self, shape: Shape) -> np.ndarray:
        """How much of each pixel lies inside `shape`, 0..1: (SIZE, SIZE)."""
        return clamp(0.5 - shape.distance(self.x, self.y) / self.pixel)

    def paint(
        self,
        shape: Shape,
        colour: np.ndarray,
        *,
        alpha: float | np.ndarray = 1.0,  # opacity, or an (SIZE, SIZE) field of it
        bulge: float = 0.0,  # width of the rounded edge: 0 is flat, the radius of a disc makes it a ball
        shine: float = 0.0,  # strength of the highlight on the rounded part
        mottle: float = 0.0,  # deviation of brightness over the surface
        rough: float = 0.0,  # deviation of the outline
        cells: int = 10,  # grain of `mottle` and `rough`, see `noise`
        shadow: float = 0.0,  # darkness of the cast shadow, 0..1
        lift: float = 0.1,  # how far the shadow falls, and how soft it is
    ) -> None:
        """Paint `shape` over the picture. colour: (3, 1, 1), or (3, SIZE, SIZE) for a pattern."""
        window = self._window(shape.box, 2 * self.pixel + 2 * rough + (2.5 * lift if shadow else 0))
        x, y, patch = self.x[window], self.y[window], self.pixels[(slice(None), *window)]
        if not x.size:
            return
        if shadow:
            gap = shape.distance(x + lift * self.light[0], y + lift * self.light[1])
            dark = clamp(0.5 - gap / (2.5 * lift))
            patch *= 1 - shadow * dark * dark * (3 - 2 * dark)

        d = shape.distance(x, y)
        grain = self.noise(cells)[window] if rough or mottle else None
        if rough:
            d = d + rough * grain
        coverage = clamp(0.5 - d / self.pixel)
        coverage *= alpha[window] if isinstance(alpha, np.ndarray) else alpha
        tone = colour[(slice(None), *window)] if colour.shape[1] > 1 else colour
        if mottle:
            tone = tone * (1 + mottle * grain)
        if bulge:
            tone = self._lit(tone, d, bulge, shine)
        patch += coverage * (tone - patch)

    def develop(self) -> np.ndarray:
        """Expose, tint, vignette, add film grain: uint8 (SIZE, SIZE, 3)."""
        rng = self.rng
        tint = 1 + rng.uniform(-0.05, 0.05) * np.array([1, 0, -1], np.float32).reshape(3, 1, 1)
        fall = (self.x * self.light[0] + self.y * self.light[1]) * rng.uniform(0.04, 0.12)  # nearer the lamp, brighter
        fall -= (self.x**2 + self.y**2) * rng.uniform(0.0, 0.07)
        picture = self.pixels * (tint * rng.uniform(0.92, 1.06) * (1 + fall))
        picture += rng.standard_normal((SIZE, SIZE), dtype=np.float32) * rng.uniform(0.004, 0.012)
        return (clamp(picture) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0).copy()

    def _window(self, box: Box, margin: float) -> tuple[slice, slice]:
        """Rows and columns of the pixels within `margin` of a world box."""
        c, s = math.cos(self.roll), math.sin(self.roll)
        x, y = (box[0] + box[2]) / 2 - self.shift[0], (box[1] + box[3]) / 2 - self.shift[1]
        hx, hy = (box[2] - box[0]) / 2 + margin, (box[3] - box[1]) / 2 + margin

        def span(centre: float, half: float) -> slice:
            first, last = (SIZE / 2 + (centre + sign * half) / self.pixel for sign in (-1, 1))
            return slice(min(max(math.floor(first), 0), SIZE), min(max(math.ceil(last), 0), SIZE))

        return span(c * y - s * x, abs(c) * hy + abs(s) * hx), span(c * x + s * y, abs(c) * hx + abs(s) * hy)

    def _lit(self, tone: np.ndarray, d: np.ndarray, bulge: float, shine: float) -> np.ndarray:
        """Lambert shading and a Blinn-Phong highlight of a surface that curves down like a quarter circle at its edge.

        With signed distance d and depth t = -d / bulge, the unit normal is (1 - t) grad d in the picture's plane.
        """
        t = clamp(1 + d / bulge)  # 1 at the outline, 0 on the flat top
        slope = t * np.float32(1 / self.pixel)
        nx, ny = np.zeros_like(d), np.zeros_like(d)
        np.subtract(d[:, 1:], d[:, :-1], out=nx[:, 1:])
        np.subtract(d[1:], d[:-1], out=ny[1:])
        nx *= slope
        ny *= slope
        nz = np.sqrt(1 - t * t)
        lx, ly, lz = self.light
        toward = nx * lx + ny * ly + nz * lz
        ambient = 0.5
        shade = (ambient + np.maximum(toward, 0)) * (1 / (ambient + lz))
        lit = tone * np.minimum(shade, 1.25)
        if shine:
            scale = 1 / math.sqrt(2 + 2 * lz)  # half vector between the lamp and the viewer at (0, 0, 1)
            gloss = np.maximum(nx * lx + ny * ly + nz * (lz + 1), 0) * scale
            for _ in range(4):  # gloss ** 16
                gloss *= gloss
            lit = lit + shine * np.minimum(gloss, 1)
        return lit
