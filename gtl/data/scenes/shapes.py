"""Outlines of shapes and concepts, and their masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

Points = Sequence[tuple[float, float]]
BODY, DETAIL, HOLE = 1, 2, 0
SUPERSAMPLE = 4


class Part(NamedTuple):
    """A polygon in units of the radius, x right and y down, and what it adds: BODY, DETAIL or HOLE."""

    points: Points
    kind: int = BODY


class Extent(NamedTuple):
    """Measures of a shape of radius 1."""

    x: float
    """Of its body's centroid."""
    y: float
    rms: float
    """Root mean square distance of its body from the centroid."""
    reach: tuple[float, float, float, float]
    """How far it goes from there to the left, top, right and bottom."""


def ellipse(x: float, y: float, rx: float, ry: float | None = None, points: int = 40) -> Points:
    """Around (x, y)."""
    turns = [2 * math.pi * i / points for i in range(points)]
    return [(x + rx * math.cos(t), y + (rx if ry is None else ry) * math.sin(t)) for t in turns]


def box(left: float, top: float, right: float, bottom: float) -> Points:
    """A rectangle."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def rounded_box(left: float, top: float, right: float, bottom: float, radius: float) -> Points:
    """A rectangle with round corners."""
    corners = [(right - radius, bottom - radius, 0), (left + radius, bottom - radius, 1),
               (left + radius, top + radius, 2), (right - radius, top + radius, 3)]  # fmt: skip
    quarter = [math.pi / 16 * i for i in range(9)]
    return [
        (x + radius * math.cos(t + k * math.pi / 2), y + radius * math.sin(t + k * math.pi / 2))
        for x, y, k in corners for t in quarter
    ]  # fmt: skip


def star(points: int, outer: float, inner: float) -> Points:
    """A point up."""
    turns = [(i * math.pi / points, inner if i % 2 else outer) for i in range(2 * points)]
    return [(r * math.sin(t), -r * math.cos(t)) for t, r in turns]


def heart() -> Points:
    """The usual sum of sines."""
    turns = [2 * math.pi * i / 60 for i in range(60)]
    return [
        (0.062 * 16 * math.sin(t) ** 3,
         -0.062 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)))
        for t in turns
    ]  # fmt: skip


PARTS: dict[str, tuple[Part, ...]] = {
    "circle": (Part(ellipse(0, 0, 0.96)),),
    "square": (Part(box(-0.84, -0.84, 0.84, 0.84)),),
    "triangle": (Part([(0, -1.1), (1.1, 0.8), (-1.1, 0.8)]),),
    "diamond": (Part([(0, -1.22), (0.84, 0), (0, 1.22), (-0.84, 0)]),),
    "star": (Part(star(5, 1.2, 0.52)),),
    "heart": (Part(heart()),),
    "ring": (Part(ellipse(0, 0, 1.03)), Part(ellipse(0, 0, 0.55), HOLE)),
    "cross": (Part(box(-1.02, -0.36, 1.02, 0.36)), Part(box(-0.36, -1.02, 0.36, 1.02))),
    "moon": (Part(ellipse(0, 0, 1.08)), Part(ellipse(0.62, -0.1, 0.9), HOLE)),
    "arrow": (Part([(-1.1, -0.36), (0, -0.36), (0, -0.92), (1.15, 0), (0, 0.92), (0, 0.36), (-1.1, 0.36)]),),
    "wug": (
        Part(ellipse(0, -1.06, 0.2)), Part(box(-0.08, -1, 0.08, -0.5)),
        Part(box(-1.06, -0.12, 1.06, 0.34)), Part(rounded_box(-0.86, -0.62, 0.86, 0.88, 0.24)),
        Part(ellipse(-0.38, -0.08, 0.24), DETAIL), Part(ellipse(0.38, -0.08, 0.24), DETAIL),
        Part(box(-0.44, 0.42, 0.44, 0.64), DETAIL),
    ),
    "dax": (
        Part(box(0.42, -1.06, 0.7, -0.4)), Part([(0, -1.1), (1.14, -0.12), (-1.14, -0.12)]),
        Part(box(-0.84, -0.2, 0.84, 0.92)), Part(box(0.1, 0.2, 0.54, 0.92), DETAIL),
        Part(box(-0.58, 0.06, -0.14, 0.5), DETAIL),
    ),
    "blick": (
        Part([(0, -1.2), (0.3, -0.86), (0.46, -0.4), (0.46, 0.64), (-0.46, 0.64), (-0.46, -0.4), (-0.3, -0.86)]),
        Part([(-0.4, 0.02), (-0.98, 0.6), (-0.98, 1), (-0.4, 0.64)]),
        Part([(0.4, 0.02), (0.98, 0.6), (0.98, 1), (0.4, 0.64)]),
        Part([(-0.24, 0.64), (0, 1.12), (0.24, 0.64)]),
        Part(ellipse(0, -0.3, 0.25), DETAIL),
    ),
}  # fmt: skip
"""Shape or concept -> its polygons in drawing order."""


def draw_masks(
    shape: str, size: int, centre: tuple[float, float], radius: float, degrees: float
) -> tuple[Image.Image, Image.Image | None]:
    """Antialiased masks (mode L, `size` x `size`) of a shape's body and of its details, if it has any.

    Args:
        shape: A key of PARTS.
        size: Side of the picture in pixels.
        centre: Of the body's centroid, (x, y) in pixels.
        radius: In pixels.
        degrees: Clockwise turn.
    """
    x, y, *_ = extent(shape)
    cos, sin = math.cos(math.radians(degrees)) * radius, math.sin(math.radians(degrees)) * radius
    body, detail = (Image.new("L", (size * SUPERSAMPLE,) * 2) for _ in range(2))
    pens = {BODY: ImageDraw.Draw(body), HOLE: ImageDraw.Draw(body), DETAIL: ImageDraw.Draw(detail)}
    for points, kind in PARTS[shape]:
        turned = [
            ((centre[0] + (px - x) * cos - (py - y) * sin) * SUPERSAMPLE,
             (centre[1] + (px - x) * sin + (py - y) * cos) * SUPERSAMPLE)
            for px, py in points
        ]  # fmt: skip
        if kind == DETAIL:
            pens[BODY].polygon(turned, 0)
        pens[kind].polygon(turned, 0 if kind == HOLE else 255)
    has_detail = any(part.kind == DETAIL for part in PARTS[shape])
    return body.reduce(SUPERSAMPLE), detail.reduce(SUPERSAMPLE) if has_detail else None


@lru_cache
def extent(shape: str) -> Extent:
    """Measured on a large mask."""
    side, radius = 512, 160.0
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    for points, kind in PARTS[shape]:
        pen.polygon([(side / 2 + x * radius, side / 2 + y * radius) for x, y in points], int(kind == BODY))
    ys, xs = np.nonzero(np.asarray(mask))
    x, y = xs.mean(), ys.mean()
    rms = math.sqrt(((xs - x) ** 2 + (ys - y) ** 2).mean())
    reach = (x - xs.min(), y - ys.min(), xs.max() - x, ys.max() - y)
    centre = ((x + 0.5 - side / 2) / radius, (y + 0.5 - side / 2) / radius)
    return Extent(*centre, rms / radius, (reach[0] / radius, reach[1] / radius, reach[2] / radius, reach[3] / radius))
