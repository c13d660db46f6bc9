"""The colours of one picture brought to another's: of a product beside others of its line, or of an edit back to the
light of the photograph that it is in.

Mean and deviation of each channel are made those of the other (Reinhard et al. 2001, "Color Transfer between Images").
It is done in CIELAB and not in the paper's own l-alpha-beta, whose logarithms have no value for black.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gtl.types import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Floats = NDArray[np.float64]

_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = _TO_XYZ.sum(1)
_LINEAR = (6 / 29) ** 3
"""Where CIELAB goes over from a line to the cube root."""
FLAT = 1e-3
"""Deviation up to which a channel has but one value, which nothing can be spread from."""
BAND = 2**18
"""Pixels whose colours are taken at once: in CIELAB a photograph is twenty times as large as it is."""


class Palette(NamedTuple):
    """The colours of a picture, in CIELAB: lightness, green to red, blue to yellow."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]


def palette_of(image: Image, clear: Image | None = None) -> Palette:
    """The colours of a picture of any size.

    Args:
        image: The picture.
        clear: Of its size, light where it is transparent, which has no colour. None: nowhere.

    Raises:
        UserError: all of it is transparent.
    """
    from gtl.generate.edit import HALF

    rows = max(1, BAND // image.width)
    total, squares, number = np.zeros(3), np.zeros(3), 0
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        rgb = np.asarray(image.crop(box).convert("RGB"))
        seen = rgb.reshape(-1, 3) if clear is None else rgb[np.asarray(clear.crop(box).convert("L")) < HALF]
        lab = to_lab(seen)
        total, squares, number = total + lab.sum(0), squares + (lab**2).sum(0), number + len(lab)
    if not number:
        raise UserError("all of it is transparent, and has no colours")
    mean = total / number
    variance = squares / number - mean**2
    return Palette(tuple(mean.tolist()), tuple(np.sqrt(variance.clip(min=0)).tolist()))


def match_colours(image: Image, palette: Palette, area: Image | None = None) -> Image:
    """An RGB picture with the colours of another one.

    Args:
        image: The picture.
        palette: Of the other one.
        area: Of the picture's size, light where its colours are to change; all else stays. None: everywhere.
    """
    from PIL import Image as Images

    from gtl.generate.edit import HALF

    changed = np.asarray(image.convert("RGB")).copy()
    inside = np.ones(changed.shape[:2], bool) if area is None else np.asarray(area.convert("L")) >= HALF
    if not inside.any():
        return image
    mine = to_lab(changed[inside])
    spread = mine.std(0)
    factor = np.where(spread > FLAT, np.array(palette.deviation) / np.maximum(spread, FLAT), 1.0)
    changed[inside] = from_lab((mine - mine.mean(0)) * factor + np.array(palette.mean))
    return Images.fromarray(changed)


def to_lab(rgb: NDArray[np.uint8]) -> Floats:
    """CIELAB of sRGB [..., 3], under D65."""
    value = rgb.astype(np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    share = linear @ _TO_XYZ.T / _WHITE
    f = np.where(share > _LINEAR, np.cbrt(share), share * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def from_lab(lab: Floats) -> NDArray[np.uint8]:
    """sRGB [..., 3] of CIELAB; what is outside of it at its edge."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    share = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    linear = np.clip((share * _WHITE) @ np.linalg.inv(_TO_XYZ).T, 0, 1)
    value = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(value * 255).astype(np.uint8)
