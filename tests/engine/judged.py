"""Runs of an objective whose first player a second one judges: the real loop, on samples that a test makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gtl.config import Recipe, parse_recipe
from gtl.families import open_family
from gtl.objectives.base import Objective
from gtl.train.assemble import join
from gtl.train.checkpoint import State
from gtl.train.loop import Lane, train
from gtl.train.plan import TrainPlan
from gtl.train.worker import make_engines
from gtl.tuners import make_tuner
from gtl.types import Batch, Geometry, Item

SAMPLES, STEPS = 3, 5
"""Of a global batch: odd, so that two ranks get uneven slices. Of a run."""
GEOMETRY = Geometry((32, 32), (0, 0), (32, 32))
Outcome = tuple[list[dict[str, float]], dict[str, State], dict[str, Tensor]]
"""Rows, states and published tensors."""
Make = Callable[[torch.Generator], Item]


def recipe_of(tuner: dict[str, Any], objective: dict[str, Any], stage: int) -> Recipe:
    return parse_recipe({
        "model": {"source": "builtin:tiny"}, "tuner": tuner, "objective": objective,
        "data": {"source": "nowhere", "resolution": 32},
        "train": {"steps": STEPS, "batch_size": SAMPLES, "learning_rate": 1e-3, "optimizer": {"eps": 1e-3},
                  "zero": {"stage": stage}, "ema": 0.5},
    })  # fmt: skip


def batch_of(objective: Objective, make: Make, step: int, places: list[int]) -> Batch:
    """Samples of a step; of a place that is negative, one without weight."""
    samples = []
    for place in places:
        rng = torch.Generator().manual_seed(100 * step + max(place, 0))
        samples.append(objective.draw(make(rng), rng))
    weight = torch.tensor([1 / SAMPLES if place >= 0 else 0.0 for place in places])
    return Batch(objective.collate(samples), weight)


def batches(objective: Objective, make: Make, start: int, stop: int) -> Iterator[tuple[int, list[Batch]]]:
    """This rank's."""
    share = -(-SAMPLES // dist.get_world_size())
    places = [*range(SAMPLES), *[-1] * (dist.get_world_size() * share - SAMPLES)]
    first = share * dist.get_rank()
    for step in range(start, stop):
        yield step, [batch_of(objective, make, step, places[first : first + share])]


def play(recipe: Recipe, make: Make, stop: int, states: dict[str, State] | None = None) -> Outcome:
    """From a state if there is one."""
    family, stage = open_family("builtin:tiny"), recipe.train.zero.stage
    assert isinstance(stage, int)
    trainee = join(recipe, "fp32", family, make_tuner(recipe.tuner, family), "cpu")
    engines = make_engines(trainee, recipe, TrainPlan(STEPS, stage, SAMPLES, 1), torch.device("cpu"))
    start = 0
    for name, state in (states or {}).items():
        engines[name].load_state(state.steps, state.tensors.items())
        start = max(start, state.steps)
    rows: list[dict[str, float]] = []
    lane = Lane(seed=3, save_every=100, save=lambda step: None, report=rows.append, done=start)
    assert train(engines, batches(trainee.objective, make, start, stop), lane) == stop
    published: dict[str, Tensor] = {}
    for engine in engines.values():
        published |= engine.weights(ema=True)
    return rows, {name: engine.state() for name, engine in engines.items()}, published


def told(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """What rows say of the players."""
    players = ("autoencoder", "student", "discriminator")
    return [{name: row[name] for name in row if name.startswith(players)} for row in rows]


def same_after_a_stop(run: Callable[[int, dict[str, State] | None], Outcome]) -> None:
    """See that a run to the end and one that was stopped on the way end in the same bits.

    Args:
        run: To a step, from a state if there is one.
    """
    rows, states, published = run(STEPS, None)
    _, half, _ = run(3, None)
    rest, again, republished = run(STEPS, half)
    assert told(rest) == told(rows[3:])
    assert published.keys() == republished.keys()
    assert all(torch.equal(value, republished[name]) for name, value in published.items())
    for name, kinds in states["discriminator"].tensors.items():
        assert torch.equal(kinds["weight"], again["discriminator"].tensors[name]["weight"])
