"""What `auto` becomes."""

from typing import Any

import pytest

from gtl.config import Recipe, parse_recipe
from gtl.train.plan import Memory, TrainPlan, choose
from gtl.types import UserError

GIB = 2**30


def recipe(**train: Any) -> Recipe:
    return parse_recipe({"model": {"source": "some/model"}, "data": {"source": "photos"}, "train": train})


@pytest.mark.parametrize(
    ("batch_size", "workers", "micro_batch", "accumulation"),
    [(4, 1, 4, 1), (4, 2, 2, 1), (1, 2, 1, 1), (5, 1, 3, 2), (8, 1, 4, 2), (9, 1, 3, 3), (32, 3, 4, 3), (3, 8, 1, 1)],
)
def test_the_micro_batch_on_cpus(batch_size: int, workers: int, micro_batch: int, accumulation: int) -> None:
    plan = choose(recipe(batch_size=batch_size, steps=10), workers=workers, steps_per_epoch=3)
    assert plan == TrainPlan(10, 0, micro_batch, accumulation)
    assert workers * micro_batch * accumulation >= batch_size


@pytest.mark.parametrize(
    ("batch_size", "workers", "asked", "micro_batch", "accumulation"),
    [(8, 1, 8, 8, 1), (8, 2, 3, 3, 2), (8, 2, 16, 4, 1), (32, 2, 1, 1, 16)],
)
def test_a_given_micro_batch_is_cut_to_the_workers_share(
    batch_size: int, workers: int, asked: int, micro_batch: int, accumulation: int
) -> None:
    plan = choose(recipe(batch_size=batch_size, micro_batch=asked, steps=1), workers=workers, steps_per_epoch=3)
    assert (plan.micro_batch, plan.accumulation) == (micro_batch, accumulation)


def test_epochs_are_steps_of_the_batch_plan() -> None:
    assert choose(recipe(epochs=4), workers=1, steps_per_epoch=7).steps == 28
    assert choose(recipe(), workers=1, steps_per_epoch=7).steps == 1000


@pytest.mark.parametrize(("stage", "gib"), [(0, 2 + 16), (1, 2 + 8 + 2), (2, 2 + 4 + 3), (3, 0.5 + 4)])
def test_memory_of_each_stage(stage: int, gib: float) -> None:
    """2 GiB of frozen weights and 2**30 trained parameters on 4 workers."""
    assert Memory(2 * GIB, GIB, device_bytes=0).needed(stage, 4) == gib * GIB


@pytest.mark.parametrize(("device", "stage"), [(30, 0), (20, 1), (15, 2), (7.5, 3)])
def test_the_first_stage_that_fits(device: float, stage: int) -> None:
    memory = Memory(2 * GIB, GIB, device_bytes=int(device * GIB))
    assert choose(recipe(batch_size=64), workers=4, steps_per_epoch=1, memory=memory) == TrainPlan(1000, stage, 8, 2)


def test_a_given_stage_stays() -> None:
    assert choose(recipe(zero={"stage": 2}), workers=2, steps_per_epoch=1).stage == 2


def test_no_stage_fits() -> None:
    memory = Memory(2 * GIB, GIB, device_bytes=5 * GIB)
    with pytest.raises(UserError) as caught:
        choose(recipe(), workers=4, steps_per_epoch=1, memory=memory)
    assert str(caught.value) == (
        "train.zero.stage: auto: weights and optimizer need 4.5 GiB on each of 4 workers, "
        "3.0 GiB of a device are for them; take more workers or a smaller model"
    )
