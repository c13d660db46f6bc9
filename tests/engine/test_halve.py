"""A device without room for a micro-batch: the run goes on with half of it, and learns the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gtl.config import Recipe, parse_recipe
from gtl.storage import Store
from gtl.train.halve import HALVED, HalvedError, Limit, halving, limit, read_limit
from gtl.train.job import RESULT, Job
from gtl.train.plan import TrainPlan
from gtl.types import UserError
from tests.engine.runs import Kill, go, make_job


def losses(job: Job) -> dict[float, float]:
    rows = [json.loads(line) for line in job.run.read("metrics.jsonl").splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_a_run_without_memory_goes_on_with_half_the_micro_batch(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"steps": 4, "batch_size": 8, "zero": {"stage": 1}}
    straight = make_job(tmp_path / "straight", **asked)
    assert go(straight, 2) == [0, 0]
    job = make_job(tmp_path / "halved", **asked)
    full = Kill(1, "memory", 3)
    assert go(job, 2, full)[1] != 0
    assert json.loads(job.run.read(HALVED)) == {"asked": "auto", "micro_batch": 2, "times": 1}
    assert not job.run.exists(RESULT)
    assert go(job, 2, full) == [0, 0]
    assert list(losses(job)) == [1, 2, 3, 4]
    assert losses(job) == pytest.approx(losses(straight), rel=1e-6)


def make_recipe(**train: Any) -> Recipe:
    return parse_recipe({"model": {"source": "builtin:tiny"}, "data": {"source": "photos"},
                         "train": {"batch_size": 12, **train}})  # fmt: skip


def run_out(run: Store, recipe: Recipe, micro_batch: int) -> str:
    with (
        pytest.raises((HalvedError, UserError)) as caught,
        halving(run, recipe, TrainPlan(steps=1, stage=0, micro_batch=micro_batch, accumulation=1)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return f"{type(caught.value).__name__}: {caught.value}"


def test_it_ends_where_nothing_is_left_to_halve(tmp_path: Path) -> None:
    run, recipe = Store(tmp_path), make_recipe(max_failures=2, activation_checkpointing=True)
    assert run_out(run, recipe, 12) == "HalvedError: a worker ran out of memory with micro-batch 12; on with 6"
    assert run_out(run, recipe, 6) == "HalvedError: a worker ran out of memory with micro-batch 6; on with 3"
    assert run_out(run, recipe, 3) == (
        "UserError: train.micro_batch: 3: a worker ran out of memory, and train.max_failures: 2 allows no more starts; "
        "set it to 1"
    )
    assert run_out(run, recipe, 1) == (
        "UserError: train.micro_batch: 1: a worker ran out of memory; take train.zero.stage: 3 on more workers, "
        "train.zero.offload: cpu, a smaller model or a lower data.resolution"
    )
    assert read_limit(run) == Limit("auto", 1, 3)


def test_other_errors_pass(tmp_path: Path) -> None:
    plan = TrainPlan(steps=1, stage=0, micro_batch=2, accumulation=1)
    with pytest.raises(RuntimeError, match="^other$"), halving(Store(tmp_path), make_recipe(), plan):
        raise RuntimeError("other")
    assert read_limit(Store(tmp_path)) is None


@pytest.mark.parametrize(
    ("known", "found"),
    [
        (None, (6, 1)), (Limit("auto", 4, 1), (4, 2)), (Limit("auto", 8, 1), (6, 1)),
        (Limit(6, 3, 1), (6, 1)),  # the recipe says another now
    ],
)  # fmt: skip
def test_a_limit_changes_the_passes_and_not_the_stage(known: Limit | None, found: tuple[int, int]) -> None:
    plan = limit(TrainPlan(steps=5, stage=2, micro_batch=6, accumulation=1), make_recipe(), 2, known)
    assert plan == TrainPlan(steps=5, stage=2, micro_batch=found[0], accumulation=found[1])
