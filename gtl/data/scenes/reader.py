"""The judge: what a picture shows, measured from its pixels, and whether a caption says so. Nothing is learnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from PIL import Image, ImageFilter

from gtl.data.scenes.captions import read_caption
from gtl.data.scenes.draw import CHALK_WHITE, HATCH_PERIOD, TILES
from gtl.data.scenes.match import Match, Patch, make_patch, match
from gtl.data.scenes.regions import Floats, Line, Mask, distance_to, grow, regions, rim, share_along, shrink, to_lab
from gtl.data.scenes.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    CONCEPTS,
    GROUNDS,
    OFFSET,
    PATTERNED,
    PLACES,
    RADII,
    Background,
    Scene,
    Thing,
    tint,
)  # fmt: skip

SIDE = 64
"""Pictures are read at this side."""
SOFTEN = 0.7
"""Pixels of blur against noise before anything is measured."""
LEAST_PIXELS = 24
"""Smaller regions are specks."""
LEAST_SHARE = 0.2
"""Of the largest region; smaller ones are specks too."""
LEAST_DISTANCE = {"plain": 13.0, "gradient": 18.0, "striped": 18.0}
"""Pattern -> distance from the background (CIELAB) of what counts as an object; mixed with its tint, a colour bends."""
LEAST_SCORE = 0.88
"""Of a shape; below it none is seen."""
LEAST_HATCHING = 0.015
"""Of chalk; see `hatching`."""
LEAST_GLOW = 0.07
"""Of neon; see `glow`."""
JOINT_CONTRAST = 0.06
"""Of a mosaic: how much darker joints are than tiles, in a share of the brightness."""


@dataclass(frozen=True)
class Sight:
    """What the reader saw in a picture."""

    scene: Scene
    """The largest object first; None where something is not clear."""
    scores: tuple[float, ...]
    """How well each object's shape fits, at most 1."""


def read_picture(image: Image.Image) -> Sight:
    """What a square picture shows; larger ones than 64 pixels are reduced, so their details below that do not count."""
    rgb = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    is_mosaic = has_joints(np.asarray(rgb, np.float32))
    if is_mosaic:
        rgb = lift_joints(rgb)
    lab = to_lab(np.asarray(rgb.filter(ImageFilter.GaussianBlur(SOFTEN))))
    line, ground, style = read_background(lab)
    distance = distance_to(lab, line)
    found = list(regions(distance > LEAST_DISTANCE[ground.pattern if ground else "plain"], LEAST_PIXELS))
    least = LEAST_SHARE * found[0].sum() if found else 0
    found = [region for region in found if region.sum() >= least]
    read = [read_thing(lab, line, distance, region, style) for region in found]
    things = tuple(thing for thing, _, _ in read)
    if style == "outline" and not all(is_outline for _, _, is_outline in read):
        style = "plain"
    # Between the details of a concept there is no room for strokes; there the board has to do.
    if style == "chalk" and things and things[0].shape not in CONCEPTS:
        style = "chalk" if hatching(lab, found[0], distance) > LEAST_HATCHING else "plain"
    if style == "neon" and things:
        style = "neon" if glow(lab, line, found[0], distance) > LEAST_GLOW else "plain"
    if style == "plain" and is_mosaic:
        style = "mosaic"
    return Sight(Scene(things, ground, style), tuple(score for _, score, _ in read))


def read_background(lab: Floats) -> tuple[Line, Background | None, str]:
    """The line of its colours as they are here; its name, None for a style's own ground; the style it speaks of."""
    edge = rim(lab, 4)
    best = min(grounds(), key=lambda name: float(np.quantile(distance_to(edge, grounds()[name]), 0.75)))
    line = grounds()[best]
    share = share_along(edge, line)
    rest = edge - (line.start + share[:, None] * (line.end - line.start))
    shift = np.median(rest, 0)
    # Up to a fifth of the rim may be an object's.
    spread = np.quantile(share, 0.8) - np.quantile(share, 0.2)
    if best in GROUNDS or best not in PATTERNED or spread < 0.45:
        middle = np.median(edge, 0)
        line = Line(middle, middle)
        pattern = "plain"
    else:
        line = Line(line.start + shift, line.end + shift)
        height = np.broadcast_to(np.arange(SIDE, dtype=np.float32)[:, None, None], (SIDE, SIDE, 1))
        is_gradient = np.corrcoef(rim(height, 4)[:, 0], share)[0, 1] > 0.8
        pattern = "gradient" if is_gradient else "striped"
    if best in GROUNDS:
        return line, None, best
    return line, Background(best, pattern), "plain"


@lru_cache
def grounds() -> dict[str, Line]:
    """Background or style -> its line as it is meant to be."""
    ends = {name: (rgb, tint(rgb) if name in PATTERNED else rgb) for name, rgb in BACKGROUNDS.items()}
    ends |= {name: (rgb, rgb) for name, rgb in GROUNDS.items()}
    return {name: Line(*to_lab(np.array(pair, np.uint8))) for name, pair in ends.items()}


@lru_cache
def palette(style: str) -> Floats:
    """The objects' colours as a style shows them."""
    rgb = np.array(list(COLOURS.values()), np.float32)
    if style == "chalk":
        rgb = rgb + (255 - rgb) * CHALK_WHITE
    return to_lab(rgb.astype(np.uint8))


def read_thing(lab: Floats, line: Line, distance: Floats, region: Mask, style: str) -> tuple[Thing, float, bool]:
    """An object, how well its shape fits, and whether it is an outline."""
    inside = shrink(region)
    core = inside if inside.sum() >= LEAST_PIXELS / 2 else region
    # The half of the core that is least mixed with the background, unless details of another colour are the larger
    # part of it: then all of the core. The one that makes more sense as a shape counts.
    clear = core & (distance >= np.median(distance[core]))
    fits = [fit(lab, line, grow(region), np.median(lab[pixels], 0), style == "outline") for pixels in (clear, core)]
    found, patch, body = max(fits, key=lambda answer: answer[0].score)
    colour = tuple(COLOURS)[int(np.linalg.norm(palette(style) - body, axis=1).argmin())]
    if found.score < LEAST_SCORE:
        return Thing(None, colour), found.score, False
    limit = float(np.sqrt(RADII["small"] * RADII["large"])) * SIDE
    size = "large" if found.radius > limit else "small"
    return Thing(found.shape, colour, size, read_place(patch.x, patch.y)), found.score, found.is_outline


def hatching(lab: Floats, region: Mask, distance: Floats) -> float:
    """How much more an object's colour varies across the strokes of chalk than along them.

    In squares of its distance from the background. Only pairs of pixels inside the object count: noise and damage make
    them differ alike in both directions.
    """
    core = region
    for _ in range(3):
        if (smaller := shrink(core)).sum() >= 2 * LEAST_PIXELS:
            core = smaller
    step = round(HATCH_PERIOD * SIDE / 4)
    differences = []
    for here, there in ((np.s_[:-step, :-step], np.s_[step:, step:]), (np.s_[:-step, step:], np.s_[step:, :-step])):
        both = core[here] & core[there]
        squares = ((lab[here] - lab[there])[both] ** 2).sum(-1)
        differences.append(float(squares.mean()) if both.any() else 0.0)
    return (differences[0] - differences[1]) / max(float(np.median(distance[core])) ** 2, 1.0)


def glow(lab: Floats, line: Line, region: Mask, distance: Floats) -> float:
    """How much of an object's colour there is three pixels off it, as a share of the way from the background."""
    body = region & (distance >= 0.7 * np.quantile(distance[region], 0.9))
    near = [body]
    for _ in range(4):
        near.append(grow(near[-1]))
    colour, ground = np.median(lab[body], 0), line.start
    towards = colour - ground
    share = (lab - ground) @ towards / max(float(towards @ towards), 1.0)
    return float(np.median(share[near[4] & ~near[2]]))


def fit(lab: Floats, line: Line, region: Mask, body: Floats, outlines: bool) -> tuple[Match, Patch, Floats]:
    """The shape of what has the body's colour in a region: 1 there, 0 where it is as far off as the background is.

    Details of other colours are holes.
    """
    likeness = 1 - np.linalg.norm(lab - body, axis=-1) / max(float(distance_to(body, line)), 1.0)
    patch = make_patch(np.where(region, np.clip(1.5 * likeness - 0.25, 0, 1), 0).astype(np.float32))
    return match(patch, outlines), patch, body


def read_place(x: float, y: float) -> str:
    """The name of a centre in pixels."""
    towards = tuple(
        0 if abs(value + 0.5 - SIDE / 2) < 0.4 * OFFSET * SIDE else 1 if value > SIDE / 2 else -1 for value in (x, y)
    )
    return next(name for name, place in PLACES.items() if place == towards)


def has_joints(rgb: Floats) -> bool:
    """Whether the last row and column of every tile of a mosaic are darker than the tiles."""
    side = SIDE // TILES
    cell = rgb.mean(-1).reshape(TILES, side, TILES, side).mean((0, 2))
    tile = cell[:-1, :-1].mean()
    joints = (cell[-1, :-1].mean(), cell[:-1, -1].mean())
    return bool(max(joints) < tile * (1 - JOINT_CONTRAST))


def lift_joints(rgb: Image.Image) -> Image.Image:
    """The mosaic without its joints: every tile's own colour, smoothly."""
    side = SIDE // TILES
    pixels = np.asarray(rgb, np.float32).reshape(TILES, side, TILES, side, 3)
    tiles = np.median(pixels[:, : side - 1, :, : side - 1], axis=(1, 3))
    small = Image.fromarray(np.clip(tiles + 0.5, 0, 255).astype(np.uint8))
    return small.resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def judge(image: Image.Image, caption: str) -> dict[str, bool]:
    """What a caption claims -> whether it is so in the picture; see `compare`."""
    return compare(read_picture(image).scene, read_caption(caption))


def compare(seen: Scene, claimed: Scene) -> dict[str, bool]:
    """Claim -> whether it holds: count, shape, colour, size, place, background, pattern and style, as far as claimed.

    With two objects an attribute holds if it does of both; they are matched as suits the claims best.
    """
    answers = {"count": len(seen.things) == len(claimed.things), "style": seen.style == claimed.style}
    if claimed.background is not None:
        there = seen.background
        answers["background"] = there is not None and there.colour == claimed.background.colour
        answers["pattern"] = there is not None and there.pattern == claimed.background.pattern
    blank = Thing(None, None)
    things = [*seen.things, *[blank] * len(claimed.things)]
    options = (
        _compare_things(dict(enumerate(order)), claimed) for order in permutations(things, len(claimed.things))
    )  # fmt: skip
    return answers | max(options, key=lambda option: sum(option.values()))


def _compare_things(seen: Mapping[int, Thing], claimed: Scene) -> dict[str, bool]:
    answers: dict[str, bool] = {}
    for i, thing in enumerate(claimed.things):
        for name, value in vars(thing).items():
            if value is not None:
                answers[name] = answers.get(name, True) and getattr(seen[i], name) == value
    return answers
