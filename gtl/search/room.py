"""What a study takes from the cluster: how many trials at once, and what they read, put there before."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gtl.config import Study
from gtl.config.trials import longest, probes
from gtl.session import Cluster
from gtl.train.launch import open_model
from gtl.train.plan import steps_of
from gtl.train.prepare import prepare
from gtl.train.resources import Resources, choose_resources
from gtl.types import Progress

if TYPE_CHECKING:
    from gtl.config import Recipe
    from gtl.data.dataset import Dataset
    from gtl.search.trial import Place


@dataclass(frozen=True)
class Room:
    """What the cluster has for trials."""

    resources: Resources
    """Of the largest trial."""
    concurrency: int
    """Trials at once."""

    @property
    def devices(self) -> int:
        """Workers of a trial."""
        return self.resources.workers[1] if isinstance(self.resources.workers, tuple) else self.resources.workers


def corners(study: Study) -> list[dict[str, Any]]:
    """Configurations with every value of what decides how large a trial is and what it reads."""
    return [dict(values) for values in probes(study.space)] or [{}]


def make_room(study: Study, place: Place, cluster: Cluster) -> Room:
    """How many trials run at once, so that all of their workers have a place.

    Raises:
        UserError: the largest trial does not fit into the cluster.
    """
    recipes = {recipe.train: recipe for recipe in (place.recipe(study, values) for values in corners(study))}
    largest = max((choose_resources(recipe, cluster) for recipe in recipes.values()), key=size_of)
    workers = largest.workers[0] if isinstance(largest.workers, tuple) else largest.workers
    fits = cluster.cpus / (workers * largest.cpus_per_worker)
    if largest.gpus_per_worker:
        fits = min(fits, cluster.gpus / (workers * largest.gpus_per_worker))
    most = max(1, math.floor(fits))
    return Room(largest, most if study.concurrency == "auto" else min(study.concurrency, most))


def size_of(resources: Resources) -> float:
    """For comparison."""
    workers = resources.workers[0] if isinstance(resources.workers, tuple) else resources.workers
    return workers * (resources.cpus_per_worker + 1000 * resources.gpus_per_worker)


def fill(study: Study, place: Place, room: Room, progress: Progress) -> int:
    """Put what trials read into the cache they share, before any of them looks for it.

    Returns:
        Optimizer steps of the longest trial, also where these are known only with the data.
    """
    from gtl.search.cost import inference_tflops

    seen: dict[str, Dataset] = {}
    runs: dict[tuple[str, int, int | None, int | None], tuple[Recipe, Dataset]] = {}
    for values in corners(study):
        recipe = place.recipe(study, values)
        key = f"{recipe.data!r} {recipe.objective!r} {recipe.model!r} {recipe.tuner.train!r}"
        if key not in seen:
            family = open_model(recipe, progress)
            if "inference_tflops" in study.metrics:  # where it cannot be counted, that is better known now
                inference_tflops(recipe)
            seen[key] = prepare(recipe, family, room.resources.dtype, room.resources.gpus_per_worker, progress)
        train = recipe.train
        runs[key, train.batch_size, train.epochs, train.steps] = recipe, seen[key]
    return longest(study) or most_steps(runs.values())


def most_steps(runs: Iterable[tuple[Recipe, Dataset]]) -> int:
    """Optimizer steps of the longest of these runs, each on its data."""
    from gtl.train.course import images_of

    return max(steps_of(recipe, images_of(recipe, dataset).batches.steps_per_epoch) for recipe, dataset in runs)
