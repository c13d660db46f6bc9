"""Pairs of scenes: one, what is to be changed about it, and the same with that changed and all else as it was."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

from gtl.data.scenes.vocabulary import COLOURS, HELD_OUT, SHAPES, Scene, choose_scene

RECOLOUR = ("make it {b}", "make the {shape} {b}", "turn the {a} {shape} {b}", "change its colour to {b}")
RESHAPE = ("make it {article} {b}", "turn the {a} into {article} {b}", "replace the {a} with {article} {b}",
           "{article} {b} instead of the {a}")  # fmt: skip


class SceneEdit(NamedTuple):
    """A change of a scene."""

    before: Scene
    after: Scene
    instruction: str


def choose_edit(rng: random.Random) -> SceneEdit:
    """A plain scene of one object, and another colour or another shape for it: neither side has a held-out pair."""
    before = choose_scene(rng)
    while len(before.things) != 1:
        before = choose_scene(rng)
    (thing,) = before.things
    hidden = before.background.colour if before.background else None
    if rng.random() < 0.5:
        allowed = [c for c in COLOURS if c not in (thing.colour, hidden) and (thing.shape, c) not in HELD_OUT]
        colour = rng.choice(allowed)
        after = replace(thing, colour=colour)
        text = rng.choice(RECOLOUR).format(a=thing.colour, b=colour, shape=thing.shape)
    else:
        shape = rng.choice([s for s in SHAPES if s != thing.shape and (s, thing.colour) not in HELD_OUT])
        after = replace(thing, shape=shape)
        text = rng.choice(RESHAPE).format(a=thing.shape, b=shape, article="an" if shape[0] in "aeiou" else "a")
    return SceneEdit(before, replace(before, things=(after,)), text)
