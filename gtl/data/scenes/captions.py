"""A scene in words, and back."""

from __future__ import annotations

import random
import re
from dataclasses import replace

from gtl.data.scenes.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    CONCEPTS,
    GROUNDS,
    PATTERNS,
    RADII,
    SHAPES,
    Background,
    Scene,
    Thing,
)  # fmt: skip

STYLE_WORDS = {"outline": "outline drawing", "mosaic": "mosaic", "chalk": "chalk drawing", "neon": "neon sign"}
ONE = ("{o} on {a}", "{o}, {b}", "on {a}: {o}", "{b}, {o}", "{a} with {o}")
ONE_PLACED = ("{o} {at} on {a}", "{place}: {o}, {b}", "{o} on {a}, {place}", "on {a}, {o} {at}", "{b} with {o} {at}",
              "{at}, {o} on {a}")  # fmt: skip
TWO = ("{o} and {p} on {a}", "{b}, {o} and {p}", "on {a}: {o} and {p}")
TWO_PLACED = ("{o} {at} and {p} {pat}, {b}", "{o} {relation} {p} on {a}", "on {a}, {o} {relation} {p}",
              "{b}: {o} {relation} {p}")  # fmt: skip
BARE = ("{o}",)
BARE_PLACED = ("{o} {at}", "{place}: {o}", "{at}, {o}")
SHARE_OF_SIZED = 0.75
"""Captions that say how large a single object is."""
SHARE_OF_PLACED = 0.6
RELATIONS = {"left": "to the left of", "top": "above"}
WORD = re.compile(r"[a-z]+ (?=of\b)|(?:top|bottom) (?:left|right)|[a-z]+")
"""A word, a place of two words, or, with a space behind it, what stands before `of`."""
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


def write_caption(scene: Scene, rng: random.Random) -> str:
    """A caption that names shapes, colours, background and style, and mostly sizes and places."""
    placed = rng.random() < SHARE_OF_PLACED
    sized = rng.random() < (SHARE_OF_SIZED if len(scene.things) == 1 else 0.25)
    objects = [_object(thing, sized) for thing in scene.things]
    words = {"o": objects[0], "place": scene.things[0].place or "", "at": _at(scene.things[0].place)}
    if scene.background is not None:
        words["b"] = _background(scene.background)
        words["a"] = _with_article(words["b"])
    templates: tuple[str, ...]
    if len(scene.things) == 2:
        words |= {"p": objects[1], "pat": _at(scene.things[1].place), "relation": RELATIONS[words["place"]]}
        templates = TWO_PLACED if placed else TWO
    elif scene.background is None:
        templates = BARE_PLACED if placed else BARE
    else:
        templates = ONE_PLACED if placed else ONE
    text = rng.choice(templates).format(**words)
    if scene.style == "plain":
        return text
    style = STYLE_WORDS[scene.style]
    if text.startswith(objects[0]) and rng.random() < 0.6:
        return f"{_with_article(style)} of {text}"
    return rng.choice((f"{text}, {style}", f"{style}: {text}"))


def read_caption(caption: str) -> Scene:
    """What a caption of this vocabulary claims, None where it says nothing; words outside it are passed over."""
    adjectives: dict[str, str] = {}
    things: list[Thing] = []
    background, early, relation = None, "", ""
    text = caption.lower()
    style = next((name for name, words in STYLE_WORDS.items() if words in text), "plain")
    for found in WORD.findall(text.replace("center", "centre")):
        word = found.strip()
        if word in COLOURS or word in BACKGROUNDS:
            adjectives["colour"] = word
        elif word in RADII:
            adjectives["size"] = word
        elif word in PATTERNS:
            adjectives["pattern"] = word
        elif word in SHAPES or word in CONCEPTS:
            place = OPPOSITE.get(relation) or early or None
            things.append(Thing(word, adjectives.get("colour"), adjectives.get("size"), place))
            adjectives, relation, early = {}, "", ""
        elif word == "background" and "colour" in adjectives:
            background, adjectives = Background(adjectives["colour"], adjectives.get("pattern", "plain")), {}
        elif word == "above" or (word in OPPOSITE and found.endswith(" ")):
            relation = "top" if word == "above" else word
            things[-1:] = [replace(thing, place=relation) for thing in things[-1:]]
        elif word in ("centre", "middle") or word.split()[0] in OPPOSITE:
            place = "centre" if word == "middle" else word
            early = early if things else place
            things[-1:] = [replace(thing, place=place) for thing in things[-1:]]
    return Scene(tuple(things), None if style in GROUNDS else background, style)


def _object(thing: Thing, sized: bool) -> str:
    return _with_article(" ".join(word for word in (thing.size if sized else None, thing.colour, thing.shape) if word))


def _background(background: Background) -> str:
    pattern = "" if background.pattern == "plain" else f"{background.pattern} "
    return f"{pattern}{background.colour} background"


def _at(place: str | None) -> str:
    if place == "centre":
        return "in the centre"
    return f"on the {place}" if place in ("left", "right") else f"at the {place}"


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
