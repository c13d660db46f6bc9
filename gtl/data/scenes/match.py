"""Which shape a region is: its coverage, brought to one place and scale, beside those of all shapes."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from gtl.data.scenes.draw import STROKE, stroke
from gtl.data.scenes.regions import Floats
from gtl.data.scenes.shapes import PARTS, draw_masks

SIDE = 24
"""Of a patch, in cells."""
REACH = 2.3
"""From the centre of a patch to its edge, in root mean square distances."""
TURNS = (-12, -6, 0, 6, 12)
BLURS = (0.6, 1.1, 1.7)
"""Of templates, in pixels: as sharp as drawn, and as soft as a small model's."""


class Patch(NamedTuple):
    """A region at one place and scale."""

    cells: Floats
    """[SIDE * SIDE], zero mean and unit length."""
    x: float
    """Of the centroid, in pixels."""
    y: float
    rms: float
    """Root mean square distance of the coverage from its centroid, in pixels."""


class Match(NamedTuple):
    """The template that is nearest to a patch."""

    shape: str
    is_outline: bool
    radius: float
    """Of the shape, in pixels."""
    score: float
    """Correlation, at most 1."""


def make_patch(coverage: Floats) -> Patch:
    """Of a coverage [H, W] from 0 to 1; nothing at all looks like nothing."""
    ys, xs = np.mgrid[: coverage.shape[0], : coverage.shape[1]].astype(np.float32)
    total = max(float(coverage.sum()), 1e-6)
    x, y = float((xs * coverage).sum() / total), float((ys * coverage).sum() / total)
    rms = float(np.sqrt((((xs - x) ** 2 + (ys - y) ** 2) * coverage).sum() / total)) + 1e-3
    step = 2 * REACH * rms / SIDE
    image = Image.fromarray(coverage).transform(
        (SIDE, SIDE), Image.Transform.AFFINE,
        (step, 0, x + 0.5 - REACH * rms, 0, step, y + 0.5 - REACH * rms), Image.Resampling.BILINEAR,
    )  # fmt: skip
    cells = np.asarray(image, np.float32).ravel()
    cells = cells - cells.mean()
    return Patch(cells / (np.linalg.norm(cells) + 1e-6), x, y, rms)


def match(patch: Patch, outlines: bool) -> Match:
    """The nearest template; those of outlines, in which a circle is all but a ring, only if asked for."""
    matrix, names = templates()
    scores = matrix @ patch.cells
    if not outlines:
        scores[[is_outline for _, is_outline, _ in names]] = -1
    best = int(scores.argmax())
    shape, is_outline, relative = names[best]
    return Match(shape, is_outline, patch.rms / relative, float(scores[best]))


@lru_cache
def templates() -> tuple[Floats, list[tuple[str, bool, float]]]:
    """Patches [N, SIDE * SIDE], and of each the shape, whether it is an outline, and its rms at radius 1."""
    side, patches, names = 64, [], []
    for shape in PARTS:
        for radius in (9.6, 16.0):
            for turn in TURNS:
                body, _ = draw_masks(shape, side, (side / 2, side / 2), radius, turn)
                for outlined in (False, True) if radius > 12 else (False,):
                    for blur in BLURS:
                        mask = stroke(body, STROKE) if outlined else np.asarray(body, np.float32) / np.float32(255)
                        image = Image.fromarray((mask * 255).astype(np.uint8))
                        soft = image.filter(ImageFilter.GaussianBlur(blur))
                        patch = make_patch(np.asarray(soft, np.float32) / np.float32(255))
                        patches.append(patch.cells)
                        names.append((shape, outlined, patch.rms / radius))
    return np.stack(patches), names
