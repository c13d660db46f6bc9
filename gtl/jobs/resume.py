"""What an attempt that failed has left behind, by which the next one goes on."""

from __future__ import annotations

import datetime
import json
from typing import NamedTuple

from gtl.config import Recipe, load_recipe
from gtl.report.run import STUDY
from gtl.report.study import RECORD
from gtl.storage import Store
from gtl.train.checkpoint import latest
from gtl.train.job import CHECKPOINTS
from gtl.train.resume import PUBLISHED


class Left(NamedTuple):
    """What is there: adapters if it was through, else whether there is something to resume."""

    adapters: tuple[str, ...] = ()
    can_resume: bool = False


def stamp(milliseconds: int) -> str:
    """A time as versions of runs begin with it."""
    when = datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.timezone.utc)
    return when.strftime("%Y%m%d-%H%M%S-%f")[:-3]


def left_of(verb: str, runs: Store, name: str, since: str, recipe: Recipe) -> Left:
    """What is left of a run or study that began at a time or later, in the folder of that name.

    `--resume` takes the newest that is unfinished, which has to be this one: so what began before, or is of another
    recipe, is no reason to resume, and neither is a run without a checkpoint, which would hide behind older ones.
    """
    versions = [version for version in runs.folders() if version >= since]
    if verb == "tune":
        return left_of_study(runs, name, versions)
    for version in reversed(versions):
        if not is_of(runs, version, recipe):
            continue
        if runs.exists(f"{version}/{PUBLISHED}"):
            return Left((f"{name}@{version}",))
        if latest(runs.sub(version), CHECKPOINTS) is not None:
            return Left(can_resume=True)
    return Left()


def left_of_study(runs: Store, name: str, versions: list[str]) -> Left:
    """`left_of` of a study."""
    there = [version for version in versions if runs.exists(f"{version}/{STUDY}")]
    if not there:
        return Left()
    key = f"{there[-1]}/{RECORD}"
    record = json.loads(runs.read(key)) if runs.exists(key) else {}
    return Left(tuple(record["published"])) if record.get("ended") else Left(can_resume=True)


def is_of(runs: Store, version: str, recipe: Recipe) -> bool:
    """Whether a run is of this recipe; its `tuner.init` is pinned where the recipe names an alias."""
    if not runs.exists(f"{version}/recipe.yaml"):
        return False
    begun = load_recipe(runs.url(f"{version}/recipe.yaml"))
    tuner = begun.tuner.model_copy(update={"init": recipe.tuner.init})
    return begun.model_copy(update={"tuner": tuner}) == recipe
