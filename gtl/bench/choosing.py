"""What of several is measured: the wording that draws best, the best adapter alone, or one that is made of all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gtl.adapters import Registry
from gtl.adapters.fuse import fuse
from gtl.config import parse_study
from gtl.config.names import parse_reference
from gtl.config.templates import PLAIN, Templates
from gtl.search.fusion import at, search_weights
from gtl.search.prompts import search_prompts
from gtl.search.record import Record
from gtl.search.study import FRESH, has_ended, tune
from gtl.storage import Store
from gtl.types import Progress

if TYPE_CHECKING:
    from gtl.config import Recipe
    from gtl.search.fusion import Found

SAMPLES, STEPS = 64, 6
"""Pictures of a candidate, and how they are drawn: fewer than are measured, since there are many candidates."""
TRIES = 8
"""Weights of a sum that are tried."""
FUSED = "fused"
"""Name of what is made of several."""
STUDY = "strategy"
KINDS: dict[str, Any] = {
    "space": {
        "tuner.type": {"grid": ["lora", "freeze", "full"]},
        "tuner.freeze_depth": {"choice": [0, 0.5], "when": {"tuner.type": "freeze"}},
        "train.learning_rate": {"choice": [5e-4, 2e-3]},
    },
    "kinds": "auto", "metric": "prompt_accuracy", "trials": 6, "confirm": {"top": 2}, "publish": {"top": 1},
}  # fmt: skip
"""tune_configs/strategy.yaml with a third of its trials; the recipe's own kind and rate are among them."""


@dataclass(frozen=True)
class Chosen:
    """What is measured."""

    adapters: list[str]
    """NAME@VERSION of each that is active."""
    template: str = PLAIN
    """What prompts are drawn as."""
    told: str = ""
    """What was chosen, for the table."""
    seconds: float | None = None
    """Of training, times devices, all that it was chosen among; None: what is measured is all."""


Choose = Callable[["Recipe", Sequence[str], Progress], Chosen]
"""Of the recipe that is measured by, the adapters that were trained, and who is told how it goes."""


def worded(template: str) -> Choose:
    """Prompts inside this template."""
    return lambda _, adapters, __: Chosen(list(adapters), template)


def best_wording(templates: Sequence[str], additions: Sequence[str] = (), tries: int | None = None) -> Choose:
    """Prompts inside the template that a search finds, on seeds other than those that are measured.

    `tries` None: the best of these templates as they are.
    """

    def choose(recipe: Recipe, adapters: Sequence[str], progress: Progress) -> Chosen:
        given = Templates(templates=list(templates), additions=list(additions))
        found = search_prompts(apart(recipe), adapters, given, tries=tries or len(templates) + 1, progress=progress)
        return Chosen(list(adapters), found.best, f"{found.best}, of {len(found.tried)} templates")

    return choose


def best_alone(recipe: Recipe, adapters: Sequence[str], progress: Progress) -> Chosen:
    """The adapter that draws best by itself."""
    alone = at(adapters, weighed(recipe, adapters, progress).single)
    return Chosen(alone, told=parse_reference(alone[0]).name)


def in_one(recipe: Recipe, adapters: Sequence[str], progress: Progress) -> Chosen:
    """One LoRA of all, at the weights that draw best, of the rank of the first: no larger than that one."""
    weights = weighed(recipe, adapters, progress).best
    pairs, told = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if weight], told_of(weights)
    if len(pairs) == 1:  # none of the others makes it better
        return Chosen(at(adapters, weights), told=told)
    shelf = Registry(recipe.storage.registry)
    rank = int(shelf.show(adapters[0]).tuner["rank"])
    decided = json.dumps([list(adapters), list(weights), rank])
    version = hashlib.sha256(decided.encode()).hexdigest()[:12]
    if version not in shelf.versions(FUSED):
        fuse(shelf, pairs, "svd", name=FUSED, version=version, rank=rank, progress=progress)
    return Chosen([f"{FUSED}@{version}"], told=told)


def best_kind(recipe: Recipe, adapters: Sequence[str], progress: Progress) -> Chosen:
    """What a study over kinds of transfer publishes, of those kinds that suit the images."""
    study = parse_study({"recipe": apart(recipe).model_dump(mode="json"), **KINDS})
    studies = Store(f"{recipe.storage.runs}/{STUDY}")
    versions = studies.folders()
    ended = next((version for version in versions if has_ended(studies.sub(version))), None)
    if ended is None:
        record = tune(study, STUDY, resume=bool(versions), progress=progress)
    else:
        record = Record(studies.sub(ended), STUDY, ended, study)
    shelf = Registry(recipe.storage.registry)
    (version,) = shelf.versions(STUDY)
    kind = shelf.show(f"{STUDY}@{version}").tuner["type"]
    told = f"{kind}, of {len(record.trials)} trials"
    return Chosen([f"{STUDY}@{version}"], told=told, seconds=record.device_hours * 3600)


def told_of(weights: Sequence[float]) -> str:
    """Weights in the order of their adapters."""
    return " + ".join(f"{weight:g}" for weight in weights)


def weighed(recipe: Recipe, adapters: Sequence[str], progress: Progress) -> Found:
    """The weights that were tried. What both sides of a comparison ask for is drawn once, into the cache."""
    return search_weights(apart(recipe), adapters, tries=TRIES, progress=progress)


def apart(recipe: Recipe) -> Recipe:
    """The recipe as candidates are drawn by it: on seeds of their own, so that the choice says nothing of the rest."""
    asked = recipe.evaluate
    update = {"seed": asked.seed + 2 * FRESH, "samples": SAMPLES, "steps": STEPS}
    return recipe.model_copy(update={"evaluate": asked.model_copy(update=update)})
