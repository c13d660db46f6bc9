"""How well a model edits: pairs of built-in scenes that training never saw, and what became of what should stay."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from gtl.data.scenes.captions import write_caption
from gtl.data.scenes.edits import SceneEdit
from gtl.data.scenes.reader import compare, read_picture
from gtl.data.scenes.sets import SceneSet
from gtl.evaluate.estimate import Estimate, estimate_share
from gtl.evaluate.intervals import student_t
from gtl.families import denoising, open_family
from gtl.generate.edit import Edit
from gtl.generate.engine import Engine
from gtl.generate.images import load_parts
from gtl.generate.pixels import to_image
from gtl.generate.request import Request
from gtl.types import Progress

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

PAIRS = SceneSet(split="edits", seed=2)
"""Training has those of seed 0; the ways below were chosen by those of seed 1."""
SAME = 2
"""Values of 255 by which pixels differ at most between the two pictures of a pair where nothing is to change."""
BATCH = 8


@dataclass(frozen=True)
class Way:
    """How a picture is edited."""

    prompt: Callable[[SceneEdit], str]
    begin: Callable[[Image, SceneEdit], Edit]
    guidance: float = 3.0
    steps: int = 12


def describe(edit: SceneEdit) -> str:
    """A caption of the scene that an edit leads to."""
    return write_caption(edit.after, random.Random(edit.instruction))


def describe_before(edit: SceneEdit) -> str:
    """A caption of the scene that an edit begins at, in the same words as far as it goes."""
    return write_caption(edit.before, random.Random(edit.instruction))


INSTRUCTED = Way(lambda edit: edit.instruction, lambda image, _: Edit(image, image_guidance=1.5))
"""By a model that was taught to edit, which is told what to change."""
BEGUN = Way(describe, lambda image, _: Edit(image, strength=0.8))
"""Plain image to image, which is told all that is to be seen."""
INVERTED = Way(describe, lambda image, edit: Edit(image, strength=0.8, shows=describe_before(edit)))
"""From the noise that draws the image, told all that is to be seen."""


@dataclass(frozen=True)
class Edited:
    """What came of the pairs."""

    right: Estimate
    """Share of pictures that show the object as it is to be, where and as large as it was, on the ground it was on."""
    moved: tuple[float, float, float]
    """Mean distance, of 1, of pixels that should have stayed from what they were, with the 95 % interval."""


def edit_pairs(
    source: str, adapters: Sequence[tuple[Path, float]], way: Way, number: int, progress: Progress
) -> Edited:
    """Edit so many pairs of scenes, here, and judge them.

    Raises:
        UserError: the model or an adapter is not what it has to be.
    """
    family = denoising(open_family(source))
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    engine = Engine(family, load_parts(family, adapters, device=device, dtype=dtype), device, dtype, BATCH)
    right, moved = [0.0] * number, [0.0] * number
    for done, (index, picture) in enumerate(_draw(engine, way, number), 1):
        edit, _ = PAIRS.edit(index)
        answers = compare(read_picture(picture).scene, edit.after)
        right[index], moved[index] = float(all(answers.values())), distance(picture, index)
        progress("edit", done, number)
    rows = torch.tensor(right, dtype=torch.float64)
    share = estimate_share("prompt_accuracy", float(rows.mean()), rows, number)
    away = np.array(moved)
    margin = student_t(number - 1) * float(away.std(ddof=1)) / number**0.5
    return Edited(share, (float(away.mean()), float(away.mean()) - margin, float(away.mean()) + margin))


def _draw(engine: Engine, way: Way, number: int) -> Iterator[tuple[int, Image]]:
    positions: dict[int, int] = {}
    coming = iter(range(number))
    while True:
        while len(engine) < BATCH and (index := next(coming, None)) is not None:
            edit, _ = PAIRS.edit(index)
            request = Request(
                way.prompt(edit), PAIRS.size, PAIRS.size, seed=index, steps=way.steps, guidance=way.guidance
            )
            positions[engine.add(request, edit=way.begin(PAIRS.before(index), edit))] = index
        if not len(engine):
            return
        finished = engine.step()
        for item, pixels in zip(finished, engine.decode(finished), strict=True):
            yield positions[item.handle], to_image(pixels)


def distance(picture: Image, index: int) -> float:
    """Of the pixels that both pictures of a pair have, the mean distance from them, of 1."""
    before, after, drawn = (
        np.asarray(image).astype(np.float32) for image in (PAIRS.before(index), PAIRS.picture(index)[0], picture)
    )
    stays = np.abs(before - after).max(-1) <= SAME
    return float(np.abs(drawn - before)[stays].mean() / 255)
