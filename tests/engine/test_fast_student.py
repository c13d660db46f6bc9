"""A student that a second player judges: the same in shares, in the same bits after a stop, and what it leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gtl.adapters.apply import kind_of
from gtl.config import Recipe, parse_recipe
from gtl.families import open_family
from gtl.families.base import Conditions
from gtl.objectives.base import Objective
from gtl.train.assemble import join
from gtl.train.checkpoint import State, latest, read_manifest
from gtl.train.loop import Lane, train
from gtl.train.plan import TrainPlan
from gtl.train.worker import make_engines
from gtl.tuners import make_tuner
from gtl.types import Batch, Geometry, Item
from tests.engine.group import Group
from tests.engine.runs import go, make_job

SAMPLES, STEPS = 3, 5
"""Of a global batch: odd, so that two ranks get uneven slices. Of a run."""
TUNERS: dict[str, dict[str, Any]] = {"lora": {"type": "lora", "rank": 4}, "full": {"type": "full"}}
OBJECTIVE = {
    "type": "consistency", "guidance": 3.0, "solver_steps": 8, "adversarial": 0.5, "adversarial_after": 1,
    "adversarial_steps": 2, "r1": 0.5, "discriminator_learning_rate": 1e-2,
}  # fmt: skip
Outcome = tuple[list[dict[str, float]], dict[str, State], dict[str, Tensor]]


def recipe_of(tuner: str, stage: int) -> Recipe:
    return parse_recipe({
        "model": {"source": "builtin:tiny"}, "tuner": TUNERS[tuner], "objective": OBJECTIVE,
        "data": {"source": "nowhere", "resolution": 32},
        "train": {"steps": STEPS, "batch_size": SAMPLES, "learning_rate": 1e-3, "optimizer": {"eps": 1e-3},
                  "zero": {"stage": stage}, "ema": 0.5},
    })  # fmt: skip


@lru_cache
def conditions() -> tuple[Conditions, Conditions]:
    """Of a prompt and of none."""
    family = open_family("builtin:tiny")
    encoders = {part: family.load(part, torch.float32) for part in family.encoders}
    with torch.no_grad():
        found, null = family.encode_prompts(encoders, ["a red ring", ""])
    return found, null


def batch_of(objective: Objective, step: int, places: list[int]) -> Batch:
    """Samples of a step; of a place that is negative, one without weight."""
    samples = []
    for place in places:
        rng = torch.Generator().manual_seed(100 * step + max(place, 0))
        moments = {"mean": torch.randn(8, 8, 8, generator=rng), "logvar": torch.full((8, 8, 8), -6.0)}
        samples.append(objective.draw(Item(moments, *conditions(), Geometry((32, 32), (0, 0), (32, 32))), rng))
    weight = torch.tensor([1 / SAMPLES if place >= 0 else 0.0 for place in places])
    return Batch(objective.collate(samples), weight)


def batches(objective: Objective, start: int, stop: int) -> Iterator[tuple[int, list[Batch]]]:
    share = -(-SAMPLES // dist.get_world_size())
    places = [*range(SAMPLES), *[-1] * (dist.get_world_size() * share - SAMPLES)]
    first = share * dist.get_rank()
    for step in range(start, stop):
        yield step, [batch_of(objective, step, places[first : first + share])]


def run(tuner: str, stage: int, stop: int, states: dict[str, Any] | None = None) -> Outcome:
    """Rows, states and published tensors, from a state if there is one."""
    recipe, family = recipe_of(tuner, stage), open_family("builtin:tiny")
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


def told(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: row[name] for name in row if name.startswith(("student", "discriminator"))} for row in rows]


@pytest.mark.parametrize(
    ("tuner", "stage"),
    [("lora", 2), *(pytest.param(*case, marks=pytest.mark.soak) for case in (("lora", 0), ("full", 2)))],
)
def test_both_learn_in_shares_what_they_learn_together(solo: Group, duo: Group, tuner: str, stage: int) -> None:
    ((rows, states, published),) = solo.run(run, tuner, 0, STEPS)
    (shared, again, _), _ = duo.run(run, tuner, stage, STEPS)
    for row, other in zip(told(rows), told(shared), strict=True):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-4)
    # The second player has its turn after the student: from the first step's on, and is listened to from the second.
    assert all("discriminator_loss" in row for row in rows) and rows[-1]["discriminator_learning_rate"] == 1e-2
    assert ["student_adversarial" in row for row in rows] == [False, True, True, True, True]
    assert published and all(name.startswith("unet.") for name in published)
    assert {name.partition(".")[0] for name in states["discriminator"].tensors} == {"network"}
    assert {name.partition(".")[0] for name in states["student"].tensors} == {"unet", "passed"}
    assert (states["student"].steps, states["discriminator"].steps) == (5, 5)
    assert all("ema" not in kinds for kinds in again["discriminator"].tensors.values())


@pytest.mark.parametrize("tuner", ["lora", pytest.param("full", marks=pytest.mark.soak)])
def test_a_judged_student_goes_on_in_the_same_bits(duo: Group, tuner: str) -> None:
    (rows, states, published), _ = duo.run(run, tuner, 0, STEPS)
    (_, half, _), _ = duo.run(run, tuner, 0, 3)
    (rest, again, republished), _ = duo.run(run, tuner, 0, STEPS, half)
    assert told(rest) == told(rows[3:])
    assert published.keys() == republished.keys()
    assert all(torch.equal(value, republished[name]) for name, value in published.items())
    for name, kinds in states["discriminator"].tensors.items():
        assert torch.equal(kinds["weight"], again["discriminator"].tensors[name]["weight"])


def test_a_run_keeps_both_and_publishes_a_plain_adapter(tmp_path: Path) -> None:
    job = make_job(tmp_path, TUNERS["lora"], OBJECTIVE, steps=3)
    assert go(job, 1) == [0]
    key = latest(job.run, "checkpoints")
    assert key is not None
    manifest = read_manifest(job.run, key)
    assert list(manifest["players"]) == ["student", "discriminator"]
    heads = manifest["players"]["discriminator"]["parameters"]
    assert len(heads) == 7 * 4 and all(name.startswith("network.heads.") for name in heads)
    folder = Path(job.run.root, "adapter")
    assert kind_of(folder) == "lora"
    rank = json.loads(next(folder.rglob("adapter_config.json")).read_text())["r"]
    assert rank == 4 and not [file for file in folder.rglob("*") if b"heads" in file.read_bytes()[:100_000]]
