"""Measures of pixels: colour distances, the background's line of colours, connected regions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32)
_WHITE = np.array([0.9505, 1.0, 1.089], np.float32)
_LINEAR = np.where(
    np.arange(256) <= 0.04045 * 255, np.arange(256) / 255 / 12.92, ((np.arange(256) / 255 + 0.055) / 1.055) ** 2.4
).astype(np.float32)


class Line(NamedTuple):
    """The colours of a background, from one end to the other; a plain one has the same twice. CIELAB."""

    start: Floats
    end: Floats


def to_lab(rgb: NDArray[np.uint8]) -> Floats:
    """CIELAB (D65) of sRGB pixels [..., 3]; a distance of 10 is seen at once."""
    xyz = _LINEAR[rgb] @ _TO_XYZ.T / _WHITE
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def share_along(lab: Floats, line: Line) -> Floats:
    """How far from start to end the line is nearest to each pixel [...], from 0 to 1."""
    direction = line.end - line.start
    return np.clip((lab - line.start) @ direction / max(float(direction @ direction), 1e-6), 0, 1)


def distance_to(lab: Floats, line: Line) -> Floats:
    """Of each pixel [..., 3] from the nearest colour of a line."""
    nearest = line.start + share_along(lab, line)[..., None] * (line.end - line.start)
    return np.linalg.norm(lab - nearest, axis=-1)


def rim(values: NDArray[np.float32], width: int) -> Floats:
    """The pixels within `width` of the edge of [H, W, ...], as [N, ...]."""
    inner = np.ones(values.shape[:2], bool)
    inner[width:-width, width:-width] = False
    return values[inner]


def grow(mask: Mask) -> Mask:
    """By one pixel to the four sides."""
    a = np.pad(mask, 1)
    return a[1:-1, 1:-1] | a[:-2, 1:-1] | a[2:, 1:-1] | a[1:-1, :-2] | a[1:-1, 2:]


def shrink(mask: Mask) -> Mask:
    """By one pixel from the four sides."""
    return ~grow(~mask)


def regions(mask: Mask, least: int) -> Iterator[Mask]:
    """The connected parts of at least so many pixels, the largest first; corners connect."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        a = np.pad(labels, 1)
        rows = np.maximum(np.maximum(a[:-2], a[1:-1]), a[2:])
        spread = np.where(mask, np.maximum(np.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:]), 0)
        if np.array_equal(spread, labels):
            break
        # A label is the position of a pixel of the same region; what that one has learnt counts for all.
        labels = np.where(mask, spread.ravel()[np.maximum(spread - 1, 0)], 0)
    names, counts = np.unique(labels[mask], return_counts=True)
    for name in names[np.argsort(-counts, kind="stable")][: int((counts >= least).sum())]:
        yield labels == name
