"""A warning where a run on few images draws these images again."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gtl.config import Recipe
from gtl.data.reference import reference
from gtl.evaluate.extract import load_square
from gtl.images import cells, decode, outline, read_recipe
from gtl.storage import Store
from gtl.train.look import COLUMNS, SAMPLES
from gtl.types import UserError

if TYPE_CHECKING:
    from PIL import Image

    from gtl.families.base import Family

FEW = 50
"""Images of a run that is checked."""
SAME = 0.95
"""Cosine similarity below which nothing is a copy."""


def warn_of_copies(recipe: Recipe, family: Family, run: Store, images: int) -> None:
    """Look at the pictures of a run's last look, beside the images that it learned from.

    Costs a moment, and needs no images that are held out and no features; `memorization` of `gtl evaluate` has both.
    What goes wrong here is a warning, too: what was learned is still to be published.
    """
    try:
        look_at(recipe, family, run, images)
    except (UserError, OSError) as error:
        warnings.warn(f"{run.url()}: not compared with the images that it learned from: {error}", stacklevel=2)


def look_at(recipe: Recipe, family: Family, run: Store, images: int) -> None:
    """`warn_of_copies`.

    Raises:
        UserError: a store or an image cannot be read.
    """
    if not 1 < images <= FEW or not (recipe.pair.draws and family.draws_alone and family.encoders):
        return
    looks = sorted(key for key, _, _ in run.list(SAMPLES))
    if not looks:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "grid.png")
        run.download(looks[-1], file)
        drawn = cells(decode(file), COLUMNS, len(read_recipe(file)["prompts"]))
    works = reference(recipe.data, family, recipe.storage.cache).trained
    found = copies(drawn, [load_square(work) for work in works])
    if 2 * len(found) >= len(drawn):
        names = ", ".join(sorted({works[image].uri.rpartition("/")[2] for image in found.values()})[:3])
        warnings.warn(
            f"{len(found)} of {len(drawn)} pictures of the last look are nearer to an image that was trained on "
            f"({names}) than any two of these are to each other: they may be learned by heart. Fewer steps, a lower "
            "rate or more images help; `gtl evaluate` measures memorization",
            stacklevel=2,
        )


def copies(drawn: Sequence[Image.Image], trained: Sequence[Image.Image]) -> dict[int, int]:
    """Pictures that are nearer to an image that was trained on than any two of these are to each other -> that image.

    Images count as they are and mirrored.
    """
    real = np.stack([outline(image) for image in trained])
    mirrored = np.stack([outline(image, mirrored=True) for image in trained])
    among = np.maximum(real @ real.T, real @ mirrored.T)
    np.fill_diagonal(among, 0.0)
    likeness = np.stack([outline(picture) for picture in drawn])
    near = np.maximum(likeness @ real.T, likeness @ mirrored.T)
    least = max(SAME, float(among.max()))
    return {int(at): int(near[at].argmax()) for at in np.flatnonzero(near.max(axis=1) > least)}
