"""The nouns of a scene, and the lots that decide what is in the next one."""

from __future__ import annotations

import random
from dataclasses import dataclass

Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (214, 38, 38), "orange": (244, 132, 30), "yellow": (250, 210, 44), "green": (48, 158, 72),
    "cyan": (60, 200, 212), "blue": (42, 92, 208), "purple": (128, 62, 176), "pink": (247, 148, 190),
    "white": (250, 250, 250),
}  # fmt: skip
"""Of objects."""
BACKGROUNDS: dict[str, Rgb] = {
    "white": (250, 250, 250), "gray": (130, 134, 140), "black": (24, 24, 28), "blue": (42, 92, 208),
    "green": (48, 158, 72), "yellow": (250, 210, 44),
}  # fmt: skip
PATTERNED = ("blue", "green", "yellow")
"""Backgrounds that are also gradients or striped, from their colour to a tint of it."""
PATTERNS = ("plain", "gradient", "striped")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "ring", "cross", "moon", "arrow")
CONCEPTS = ("wug", "dax", "blick")
"""A robot's face, a house and a rocket, under names that no model has met."""
STYLES = ("plain", "outline", "mosaic", "chalk", "neon")
GROUNDS: dict[str, Rgb] = {"outline": (226, 203, 163), "chalk": (38, 68, 56), "neon": (52, 18, 76)}
"""Styles with a ground of their own: kraft paper, a school board and the sky over a city at night."""
EXCLUDED = {"outline": ("white", "ring"), "chalk": ("green",), "neon": ("purple",)}
"""Style -> colours that its ground would hide, and a shape that is an outline already."""
RADII = {"small": 0.15, "large": 0.25}
"""Size of an object -> its radius, as a share of the picture's side."""
OFFSET = 0.235
"""From the centre of the picture to an object's place, as a share of the side."""
PLACES: dict[str, tuple[int, int]] = {
    "centre": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1),
    "top left": (-1, -1), "top right": (1, -1), "bottom left": (-1, 1), "bottom right": (1, 1),
}  # fmt: skip
"""Where an object's centre is: (right, down)."""
SIDES = (("left", "right"), ("top", "bottom"))
"""Places of two objects."""
HELD_OUT = tuple((shape, tuple(COLOURS)[(3 * i + i // 3 + 1) % len(COLOURS)]) for i, shape in enumerate(SHAPES))
"""(shape, colour) that the training split never shows: one in nine, every shape once and every colour once or twice."""
SHARE_OF_TWO = 0.15
"""Of the pictures, with two objects."""


@dataclass(frozen=True)
class Thing:
    """An object. In what a caption says or a reader sees, None is what is not said or not clear."""

    shape: str | None
    colour: str | None
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Background:
    """What is behind the objects."""

    colour: str
    pattern: str = "plain"


@dataclass(frozen=True)
class Scene:
    """What is in a picture, what a caption claims, or what the reader saw."""

    things: tuple[Thing, ...]
    background: Background | None = None
    """None: not said; or the style's own ground."""
    style: str = "plain"


def choose_scene(rng: random.Random, split: str = "train", concept: str | None = None, style: str = "plain") -> Scene:
    """Draw the lots for one picture.

    Args:
        rng: Decides everything.
        split: train leaves out the HELD_OUT combinations of shape and colour, heldout shows nothing else.
        concept: One of CONCEPTS instead of a shape; then, and in a style, there is one object, and it is large: small
            ones are too coarse for details.
        style: One of STYLES.
    """
    background = None if style in GROUNDS else choose_background(rng, style)
    hidden = set(EXCLUDED.get(style, ())) | ({background.colour} if background else set())
    if concept:
        # The details of a concept are near white, which a white body would hide.
        colour = rng.choice([c for c in COLOURS if c not in hidden and c != "white"])
        chosen = [(concept, colour)]
    else:
        wanted = [(s, c) for s in SHAPES for c in COLOURS if ((s, c) in HELD_OUT) == (split == "heldout")]
        pairs = [(s, c) for s, c in wanted if s not in hidden and c not in hidden]
        two = split == "train" and style == "plain" and rng.random() < SHARE_OF_TWO
        chosen = rng.sample(pairs, 2) if two else [rng.choice(pairs)]
    places = rng.choice(SIDES) if len(chosen) == 2 else (rng.choice(tuple(PLACES)),)
    size = "small" if len(chosen) == 2 else "large" if concept or style != "plain" else rng.choice(tuple(RADII))
    things = tuple(Thing(s, c, size, place) for (s, c), place in zip(chosen, places, strict=True))
    return Scene(things, background, style)


def choose_background(rng: random.Random, style: str) -> Background:
    """A plain one three times of four; a mosaic's is never patterned, nor black, on which its joints would not show."""
    if style == "mosaic":
        return Background(rng.choice([name for name in BACKGROUNDS if name != "black"]))
    if rng.random() < 0.75:
        return Background(rng.choice(tuple(BACKGROUNDS)))
    return Background(rng.choice(PATTERNED), rng.choice(PATTERNS[1:]))


def tint(rgb: Rgb) -> Rgb:
    """The light end of a patterned background."""
    r, g, b = (round(channel + 0.55 * (255 - channel)) for channel in rgb)
    return r, g, b
