"""Weights of looks at a run, kept as they would be published: registries of the run, with the step as version."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtl.adapters import Registry
from gtl.adapters.card import Card, base_of
from gtl.config import parse_recipe
from gtl.storage import Store, explained

if TYPE_CHECKING:
    from gtl.train.assemble import Trainee
    from gtl.train.job import Job
    from gtl.train.loop import Learner
    from gtl.train.saver import Saver

BEST = "best"
"""In a run's folder: the weights that were the best so far, where the run's workers judge them."""
CANDIDATES = "candidates"
"""In a run's folder: weights that others measure."""


def keep(engines: Mapping[str, Learner], job: Job, trainee: Trainee, step: int, is_best: bool, saver: Saver) -> None:
    """Copy the weights of a step as they would be published and begin to write them. Collective."""
    import torch.distributed as dist

    saver.wait()  # before the next weights are copied: there is memory for one
    tensors: dict[str, Any] = {}
    for engine in engines.values():
        tensors |= engine.weights(ema=job.recipe["train"]["ema"] is not None)
    if dist.get_rank() != 0:
        return
    folder, version = BEST if is_best else CANDIDATES, f"{step:08d}"
    model = job.recipe["model"]
    base = base_of(trainee.family, model["source"], model["revision"], job.base)
    card = Card(
        name=job.name, version=version, base=base, tuner=job.recipe["tuner"], objective=job.recipe["objective"],
        sampler=parse_recipe(job.recipe).sampler,
    )  # fmt: skip

    def commit() -> None:
        shelf = Registry(job.run.url(folder))
        if version not in shelf.versions(job.name):  # else an earlier part of the run had the same at that step
            with tempfile.TemporaryDirectory() as temporary:
                with explained(temporary):
                    trainee.tuner.export(tensors, Path(temporary))
                shelf.publish(job.name, version, Path(temporary), card)
        if is_best:
            forget(job.run, folder, lambda other: other == step)

    saver.submit(commit)


def kept(run: Store, folder: str) -> list[int]:
    """Steps of the weights in one of a run's registries, in order."""
    shelf = Registry(run.url(folder))
    return [int(version) for name in shelf.store.folders() for version in shelf.versions(name)]


def forget(run: Store, folder: str, wanted: Callable[[int], bool]) -> None:
    """Remove the weights of other steps than those wanted from one of a run's registries."""
    shelf = Registry(run.url(folder))
    for name in shelf.store.folders():
        for version in shelf.versions(name):
            if not wanted(int(version)):
                shelf.remove(f"{name}@{version}")


def take(run: Store, folder: str, step: int) -> None:
    """Make the weights of a step those that the run publishes.

    Raises:
        UserError: they are damaged.
    """
    shelf = Registry(run.url(folder))
    (name,) = shelf.store.folders()
    version = f"{name}@{step:08d}"
    source, card = shelf.fetch(version), shelf.show(version)
    for file in card.files:
        run.upload(source / file, f"adapter/{file}")
