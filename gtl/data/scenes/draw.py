"""From a scene to a picture: jittered in place, scale, turn, hue and shading, so that no two of a caption are equal."""

from __future__ import annotations

import colorsys
import random
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from gtl.data.scenes.shapes import draw_masks, extent
from gtl.data.scenes.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    GROUNDS,
    OFFSET,
    PLACES,
    RADII,
    Background,
    Rgb,
    Scene,
    Thing,
    tint,
)  # fmt: skip

Pixels = NDArray[np.float32]
"""[H, W, 3] from 0 to 255, or a mask [H, W] from 0 to 1."""

Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a thing, in pixels; right and bottom are outside."""
CREAM: Rgb = (250, 246, 232)
"""Of a concept's details."""
TILES = 16
"""Of a mosaic's side."""
JOINT = 0.65
"""Brightness of a mosaic's joints, relative to its tiles."""
STROKE = 0.055
"""Of an outline, as a share of the side."""
HATCH_PERIOD = 0.1875
"""Of chalk strokes, to the right or down, as a share of the side."""
CHALK_WHITE = 0.25
"""How far chalk pales a colour."""
GLOW = 0.08
"""How far a neon sign shines, as a share of the side."""


def draw(scene: Scene, size: int, rng: random.Random) -> Image.Image:
    """An RGB picture of a scene, `size` x `size`; `rng` decides what the scene leaves open."""
    return draw_boxed(scene, size, rng)[0]


def draw_boxed(scene: Scene, size: int, rng: random.Random) -> tuple[Image.Image, list[Box]]:
    """`draw`, and where its things are."""
    canvas = draw_background(scene, size, rng)
    noise = np.random.default_rng(rng.getrandbits(64))
    boxes = [_draw_thing(canvas, thing, scene.style, rng, noise) for thing in scene.things]
    if scene.style == "mosaic":
        canvas = lay_tiles(canvas, noise)
    return Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8)), boxes


def draw_background(scene: Scene, size: int, rng: random.Random) -> Pixels:
    """The canvas without objects."""
    if scene.background is None:
        if scene.style not in GROUNDS:
            raise ValueError(f"{scene}: no background")
        return _ground(scene.style, size, rng)
    rgb = BACKGROUNDS[scene.background.colour]
    first, last = (np.array(_jitter(c, rng), np.float32) for c in (rgb, tint(rgb)))
    share = _share_of_tint(scene.background, size, rng)[..., None]
    return np.broadcast_to(first + (last - first) * share, (size, size, 3)).astype(np.float32)


def _share_of_tint(background: Background, size: int, rng: random.Random) -> Pixels:
    """How far each pixel is from the background's colour to its tint."""
    down, right = np.meshgrid(np.linspace(0, 1, size, dtype=np.float32), np.linspace(0, 1, size, dtype=np.float32),
                              indexing="ij")  # fmt: skip
    if background.pattern == "gradient":
        return down
    if background.pattern == "striped":
        phase, count = rng.random(), rng.uniform(4.4, 5.6)
        wave = np.sin(2 * np.pi * ((down + right) / np.sqrt(2) * count + phase))
        # A slope of one pixel between stripes instead of a jagged edge.
        return np.clip(0.5 + wave * size / (2 * np.pi * count), 0, 1)
    return np.zeros((size, size), np.float32)


def _ground(style: str, size: int, rng: random.Random) -> Pixels:
    """Kraft paper with fibres, a school board that was wiped, or haze."""
    noise = np.random.default_rng(rng.getrandbits(64))
    coarse = _blurred_noise(noise, size, size / 10) * 5
    fine = _blurred_noise(noise, size, size / 128) * 2.5
    return np.array(_jitter(GROUNDS[style], rng), np.float32) + (coarse + fine)[..., None]


def _blurred_noise(noise: np.random.Generator, size: int, sigma: float) -> Pixels:
    """Zero mean, unit deviation."""
    image = Image.fromarray(noise.integers(0, 256, (size, size), np.uint8)).filter(ImageFilter.GaussianBlur(sigma))
    values = np.asarray(image, np.float32)
    return (values - values.mean()) / (values.std() + 1e-3)


def _draw_thing(
    canvas: Pixels, thing: Thing, style: str, rng: random.Random, noise: np.random.Generator
) -> Box:  # fmt: skip
    """Draw a thing, and say where."""
    assert thing.shape and thing.colour and thing.size and thing.place
    size = len(canvas)
    radius = RADII[thing.size] * size * rng.uniform(0.92, 1.08)
    towards = PLACES[thing.place]
    x, y = (size * (0.5 + OFFSET * side + rng.uniform(-0.035, 0.035)) for side in towards)
    left, top, right, bottom = (radius * side + 0.02 * size for side in extent(thing.shape).reach)
    # Pushed inside where it would be cut off.
    centre = min(max(x, left), size - right), min(max(y, top), size - bottom)
    body, detail = draw_masks(thing.shape, size, centre, radius, rng.uniform(-10, 10))
    box = body.getbbox()
    assert box is not None
    rgb = np.array(_jitter(COLOURS[thing.colour], rng), np.float32)
    # Lit from the top left, a little.
    shade = 1 + rng.uniform(0.02, 0.09) * _ramp(size)[..., None]
    if style == "outline":
        _blend(canvas, stroke(body, STROKE), rgb * 0.92)
        if detail is not None:
            _blend(canvas, stroke(detail, 0.03), rgb * 0.92)
        return box
    if style == "chalk":
        rgb = rgb + (255 - rgb) * CHALK_WHITE
        _blend(canvas, _grain(body, noise), rgb)
        if detail is not None:
            _blend(canvas, _grain(detail, noise), np.array(CREAM, np.float32))
        return box
    if style == "neon":
        _blend(canvas, _as_mask(body.filter(ImageFilter.GaussianBlur(GLOW * size))), rgb)
    _blend(canvas, _as_mask(body), rgb * shade)
    if detail is not None:
        _blend(canvas, _as_mask(detail), np.array(CREAM, np.float32))
    return box


def _blend(canvas: Pixels, mask: Pixels, colour: Pixels) -> None:
    canvas += mask[..., None] * (colour - canvas)


def _as_mask(image: Image.Image) -> Pixels:
    return np.asarray(image, np.float32) / np.float32(255)


def stroke(mask: Image.Image, width: float) -> Pixels:
    """The inner rim of a mask, `width` of the picture's side wide."""
    inside = mask
    for step in range(max(1, round(width * mask.width))):
        # Squares and pluses in turn keep round things round.
        inside = inside.filter(ImageFilter.MinFilter(3)) if step % 2 else _erode_by_plus(inside)
    return _as_mask(mask) - _as_mask(inside)


def _erode_by_plus(mask: Image.Image) -> Image.Image:
    a = np.pad(np.asarray(mask), 1)
    least = np.minimum.reduce([a[1:-1, 1:-1], a[:-2, 1:-1], a[2:, 1:-1], a[1:-1, :-2], a[1:-1, 2:]])
    return Image.fromarray(least)


def _grain(mask: Image.Image, noise: np.random.Generator) -> Pixels:
    """Chalk: a firm rim, and an inside hatched from the lower left to the upper right."""
    size = mask.width
    grain = _blurred_noise(noise, size, size / 128)
    down, right = np.mgrid[:size, :size]
    hatch = np.sin(2 * np.pi * (down + right) / (size * HATCH_PERIOD) + noise.uniform(0, 6))
    inside = np.clip(0.68 + 0.24 * hatch + 0.1 * grain, 0, 1)
    rim = stroke(mask, 0.03)
    return np.maximum(_as_mask(mask) * inside, rim * np.clip(0.9 + 0.08 * grain, 0, 1)).astype(np.float32)


def lay_tiles(canvas: Pixels, noise: np.random.Generator) -> Pixels:
    """The picture as TILES x TILES tiles of one colour each, with dark joints."""
    size = len(canvas)
    if size % TILES:
        raise ValueError(f"a mosaic of {size} pixels: has to be a multiple of {TILES}")
    side = size // TILES
    tiles = canvas.reshape(TILES, side, TILES, side, 3).mean((1, 3))
    tiles *= noise.uniform(0.965, 1.035, (TILES, TILES, 1)).astype(np.float32)
    joint = np.arange(size) % side >= side - max(1, side // 5)
    dark = np.where(joint[:, None] | joint[None, :], JOINT, 1).astype(np.float32)
    return tiles.repeat(side, 0).repeat(side, 1) * dark[..., None]


def _jitter(rgb: Rgb, rng: random.Random) -> tuple[float, float, float]:
    """A colour nearby, of the same name."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in rgb))
    hue = (hue + rng.uniform(-0.011, 0.011)) % 1
    saturation, value = min(1, saturation * rng.uniform(0.93, 1.07)), min(1, value * rng.uniform(0.94, 1.05))
    r, g, b = colorsys.hsv_to_rgb(hue, saturation, value)
    return r * 255, g * 255, b * 255


@lru_cache
def _ramp(size: int) -> Pixels:
    """From 1 at the top left to -1 at the bottom right."""
    line = np.linspace(1, -1, size, dtype=np.float32)
    return ((line[:, None] + line[None, :]) / 2).astype(np.float32)
