"""A codec that a second player judges: the same in shares, in the same bits after a stop, and what it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
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
from tests.engine.group import Group

SAMPLES, STEPS = 3, 5
"""Of a global batch: odd, so that two ranks get uneven slices. Of a run."""
Outcome = tuple[list[dict[str, float]], dict[str, State], dict[str, Tensor]]


def recipe_of(stage: int) -> Recipe:
    return parse_recipe({
        "model": {"source": "builtin:tiny"},
        "tuner": {"type": "full", "train": ["vae"]},
        "objective": {"type": "autoencode", "perceptual": 0.5, "adversarial": 0.1, "adversarial_after": 2},
        "data": {"source": "nowhere", "resolution": 32},
        "train": {"steps": STEPS, "batch_size": SAMPLES, "learning_rate": 1e-3, "optimizer": {"eps": 1e-3},
                  "zero": {"stage": stage}, "ema": 0.5},
    })  # fmt: skip


def batch_of(objective: Objective, step: int, places: list[int]) -> Batch:
    """Samples of a step; of a place that is negative, one without weight."""
    samples = []
    for place in places:
        rng = torch.Generator().manual_seed(100 * step + max(place, 0))
        coarse = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8, generator=rng)
        pixels = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
        samples.append(objective.draw(Item({}, {}, {}, Geometry((32, 32), (0, 0), (32, 32)), pixels=pixels), rng))
    weight = torch.tensor([1 / SAMPLES if place >= 0 else 0.0 for place in places])
    return Batch(objective.collate(samples), weight)


def batches(objective: Objective, start: int, stop: int) -> Iterator[tuple[int, list[Batch]]]:
    share = -(-SAMPLES // dist.get_world_size())
    places = [*range(SAMPLES), *[-1] * (dist.get_world_size() * share - SAMPLES)]
    first = share * dist.get_rank()
    for step in range(start, stop):
        yield step, [batch_of(objective, step, places[first : first + share])]


def run(stage: int, stop: int, states: dict[str, Any] | None = None) -> Outcome:
    """Rows, states and published tensors, from a state if there is one."""
    recipe, family = recipe_of(stage), open_family("builtin:tiny")
    trainee = join(recipe, "fp32", family, make_tuner(recipe.tuner, family), "cpu")
    engines = make_engines(trainee, recipe, TrainPlan(STEPS, stage, SAMPLES, 1), torch.device("cpu"))
    start = 0
    for name, state in (states or {}).items():
        engines[name].load_state(state.steps, state.tensors.items())
        start = max(start, state.steps)
    rows: list[dict[str, float]] = []
    lane = Lane(seed=3, save_every=100, save=lambda step: None, report=rows.append, done=start)
    assert train(engines, batches(trainee.objective, start, stop), lane) == stop
    published: dict[str, Tensor] = {}
    for engine in engines.values():
        published |= engine.weights(ema=True)
    return rows, {name: engine.state() for name, engine in engines.items()}, published


def losses(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: row[name] for name in row if name.startswith(("autoencoder", "discriminator"))} for row in rows]


@pytest.mark.parametrize("stage", [0, 2])
def test_both_learn_in_shares_what_they_learn_together(solo: Group, duo: Group, stage: int) -> None:
    ((rows, states, published),) = solo.run(run, 0, STEPS)
    (shared, again, _), _ = duo.run(run, stage, STEPS)
    for row, other in zip(losses(rows), losses(shared), strict=True):
        assert other == pytest.approx(row, rel=1e-4, abs=1e-5)
    told = [{name for name in row if name.endswith("_loss")} for row in losses(rows)]
    # It has its turn after the codec: from the second step's on, and is listened to from the third.
    assert told == [{"autoencoder_loss"}] + [{"autoencoder_loss", "discriminator_loss"}] * 4
    assert ["autoencoder_adversarial" in row for row in rows] == [False, False, True, True, True]
    assert published and all(name.startswith("vae.") for name in published)
    assert {name.partition(".")[0] for name in states["discriminator"].tensors} == {"network"}
    assert {name.partition(".")[0] for name in states["autoencoder"].tensors} == {"vae", "passed"}
    assert (states["autoencoder"].steps, states["discriminator"].steps) == (5, 4)
    assert all("ema" not in kinds for kinds in again["discriminator"].tensors.values())


def test_a_judged_codec_goes_on_in_the_same_bits(duo: Group) -> None:
    (rows, states, published), _ = duo.run(run, 0, STEPS)
    (_, half, _), _ = duo.run(run, 0, 3)
    (rest, again, republished), _ = duo.run(run, 0, STEPS, half)
    assert losses(rest) == losses(rows[3:])
    assert published.keys() == republished.keys()
    assert all(torch.equal(value, republished[name]) for name, value in published.items())
    for name, kinds in states["discriminator"].tensors.items():
        assert torch.equal(kinds["weight"], again["discriminator"].tensors[name]["weight"])
