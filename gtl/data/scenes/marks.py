"""Random marks that show nothing: what a codec learns from, so that it can carry pictures of things never seen.

A codec that has seen plain scenes alone draws everything as a plain scene; real ones have seen all kinds of pictures.
"""

from __future__ import annotations

import random
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

FINER = 4
"""Marks are drawn so many times larger and then reduced, which smooths their edges."""
Colour = tuple[int, int, int]
Point = tuple[float, float]


def draw_marks(size: int, rng: random.Random) -> Image.Image:
    """An RGB picture, `size` x `size`: a ground, then up to eight strokes, patches and grids, then perhaps grain."""
    wide = size * FINER
    image = _ground(wide, rng)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 8)):
        rng.choice((_patch, _patch, _blob, _strokes, _grid))(pen, wide, rng)
    image = image.resize((size, size), Image.Resampling.BOX)
    if rng.random() < 0.3:
        noise = np.random.default_rng(rng.getrandbits(64)).normal(0, rng.uniform(2, 25), (size, size, 1))
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5))) if rng.random() < 0.2 else image


def _colour(rng: random.Random) -> Colour:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _point(wide: int, rng: random.Random) -> Point:
    return rng.uniform(0, wide), rng.uniform(0, wide)


def _ground(wide: int, rng: random.Random) -> Image.Image:
    """Two to sixteen colours that run into each other, or one."""
    cells = rng.choice((1, 1, 2, 4))
    colours = np.array([_colour(rng) for _ in range(cells * cells)], np.uint8).reshape(cells, cells, 3)
    return Image.fromarray(colours).resize((wide, wide), Image.Resampling.BICUBIC)


def _patch(pen: ImageDraw.ImageDraw, wide: int, rng: random.Random) -> None:
    """A polygon around a point, filled, outlined or both."""
    x, y = _point(wide, rng)
    reach, corners = rng.uniform(0.05, 0.4) * wide, rng.randint(3, 9)
    angles = sorted(rng.uniform(0, 2 * np.pi) for _ in range(corners))
    points = [(x + np.cos(a) * reach * (r := rng.uniform(0.3, 1)), y + np.sin(a) * reach * r) for a in angles]
    fill = _colour(rng) if rng.random() < 0.7 else None
    pen.polygon(points, fill, None if fill and rng.random() < 0.6 else _colour(rng), _width(wide, rng))


def _blob(pen: ImageDraw.ImageDraw, wide: int, rng: random.Random) -> None:
    """An ellipse, filled, outlined or both."""
    x, y = _point(wide, rng)
    right, down = (rng.uniform(0.02, 0.3) * wide for _ in range(2))
    fill = _colour(rng) if rng.random() < 0.7 else None
    outline = None if fill and rng.random() < 0.6 else _colour(rng)
    pen.ellipse((x - right, y - down, x + right, y + down), fill, outline, _width(wide, rng))


def _strokes(pen: ImageDraw.ImageDraw, wide: int, rng: random.Random) -> None:
    """A few parallel lines, or a crooked one."""
    colour, width = _colour(rng), _width(wide, rng)
    if rng.random() < 0.5:
        pen.line([_point(wide, rng) for _ in range(rng.randint(2, 6))], colour, width, joint="curve")
        return
    (x, y), (along, across) = _point(wide, rng), (rng.uniform(-0.5, 0.5) * wide, rng.uniform(-0.5, 0.5) * wide)
    step = cast("Point", tuple(rng.uniform(-0.12, 0.12) * wide for _ in range(2)))
    for i in range(rng.randint(2, 10)):
        pen.line((x + i * step[0], y + i * step[1], x + i * step[0] + along, y + i * step[1] + across), colour, width)


def _grid(pen: ImageDraw.ImageDraw, wide: int, rng: random.Random) -> None:
    """Rows and columns of lines, or a board of cells, in a rectangle."""
    left, top = _point(wide, rng)
    cell, columns, rows = rng.uniform(0.03, 0.15) * wide, rng.randint(2, 24), rng.randint(2, 24)
    colour, width, lines = _colour(rng), _width(wide, rng, 0.02), rng.random() < 0.6
    if lines:
        for i in range(columns + 1):
            pen.line((left + i * cell, top, left + i * cell, top + rows * cell), colour, width)
        for i in range(rows + 1):
            pen.line((left, top + i * cell, left + columns * cell, top + i * cell), colour, width)
        return
    for i in range(columns):
        for j in range(i % 2, rows, 2):
            x, y = left + i * cell, top + j * cell
            pen.rectangle((x, y, x + cell, y + cell), colour)


def _width(wide: int, rng: random.Random, largest: float = 0.08) -> int:
    return round(rng.uniform(0.01, largest) * wide)
