"""The words of the built-in scenes."""

from __future__ import annotations

import re
from itertools import chain

from gtl.data.scenes.captions import STYLE_WORDS
from gtl.data.scenes.sets import SceneSet
from gtl.data.scenes.vocabulary import CONCEPTS

CAPTIONS = 4000
"""Captions of the training set that together have all its words."""


def vocabulary() -> set[str]:
    """The words of the training captions, and of the concepts and styles that training never shows.

    Those are as much words as any: what has to be learned of them is their meaning.
    """
    kept_out = {*CONCEPTS, *chain.from_iterable(words.split() for words in STYLE_WORDS.values())}
    return {word for text in captions() for word in re.findall("[a-z]+", text.lower())} | kept_out


def captions() -> list[str]:
    """Of the training set, enough to have all its words."""
    scenes = SceneSet()
    return [scenes.caption(i) for i in range(CAPTIONS)]
