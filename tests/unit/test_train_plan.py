"""What `auto` becomes."""

from dataclasses import replace
from typing import Any

import pytest

from gtl.config import Recipe, parse_recipe
from gtl.train.footprint import Activations, Block, Footprint
from gtl.train.plan import Memory, Need, TrainPlan, choose, micro_batches, need
from gtl.types import UserError

GIB = 2**30
SIZES = Footprint(
    parts={"unet": 3 * GIB}, blocks=(Block("a", 0, 0, GIB // 4), Block("b", 0, 0, GIB // 8)), frozen_bytes=2 * GIB,
    trained=GIB,
    fixed=Activations(0, 0), per_image=Activations(GIB / 2, GIB / 8),
)  # fmt: skip
"""2 GiB of frozen weights, 2**30 trained parameters, and half a GiB of activations an image."""
BUCKET = 4 * 50_000_000


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


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer", "buffers"),
    [
        (0, 2 + 4, 4, 8, 0),
        (1, 2 + 4 + 1, 4, 2, BUCKET / GIB),
        (2, 2 + 4 + 1, 1, 2, BUCKET / GIB),
        (3, 0.5 + 1 + 1, 1, 2, BUCKET / GIB + 0.25),
    ],
)
def test_memory_of_each_stage_on_four_workers(
    stage: int, weights: float, gradients: float, optimizer: float, buffers: float
) -> None:
    found = need(SIZES, recipe(), stage=stage, workers=4, micro_batch=3)
    assert found == Need(weights * GIB, gradients * GIB, optimizer * GIB, buffers * GIB, 1.5 * GIB)
    assert found.total == pytest.approx((weights + gradients + optimizer + buffers + 1.5) * GIB)


def test_memory_of_options() -> None:
    plain = need(SIZES, recipe(), stage=2, workers=4, micro_batch=2)
    averaged = need(SIZES, recipe(ema=0.99), stage=2, workers=4, micro_batch=2)
    assert averaged.weights - plain.weights == GIB
    small = need(SIZES, recipe(optimizer={"type": "adamw_8bit"}), stage=0, workers=1, micro_batch=2)
    assert small.optimizer == 2 * GIB
    checkpointed = need(SIZES, recipe(activation_checkpointing=True), stage=2, workers=4, micro_batch=2)
    assert (plain.activations, checkpointed.activations) == (GIB, GIB / 4)


@pytest.mark.parametrize(
    ("device", "stage", "micro_batch"),
    [(80, 0, 16), (24, 0, 6), (20.6, 0, 1), (19, 1, 6), (12, 2, 1), (10, 3, 6)],
)
def test_the_first_stage_that_fits_with_the_largest_micro_batch(device: float, stage: int, micro_batch: int) -> None:
    """Without activations the stages need 18, 13.2, 10.2 and 5.9 GiB; 0.9 of a device is for them."""
    memory = Memory(SIZES, device * GIB)
    plan = choose(recipe(batch_size=64), workers=4, steps_per_epoch=1, memory=memory)
    assert (plan.stage, plan.micro_batch) == (stage, micro_batch)
    assert plan.micro_batch * plan.accumulation >= 16


def test_a_micro_batch_takes_no_more_passes_than_the_next_larger_one_needs() -> None:
    assert micro_batches(16, 32) == [16, 8, 6, 4, 3, 2, 1]
    assert micro_batches(5, 4) == [3, 2, 1]
    assert micro_batches(1, 4) == [1]


def test_a_given_stage_stays_whether_it_fits_or_not() -> None:
    assert choose(recipe(zero={"stage": 2}), workers=2, steps_per_epoch=1).stage == 2
    memory = Memory(SIZES, GIB)
    assert choose(recipe(zero={"stage": 2}), workers=2, steps_per_epoch=1, memory=memory).stage == 2


def test_no_stage_fits() -> None:
    with pytest.raises(UserError) as caught:
        choose(recipe(), workers=4, steps_per_epoch=1, memory=Memory(SIZES, 5 * GIB))
    assert str(caught.value) == (
        "train.zero.stage: auto: at stage 3 and micro-batch 1 each of 4 workers needs 6.4 GiB, of which activations "
        "are 0.5 GiB; 4.5 GiB of a device are for them; take train.activation_checkpointing: true, train.zero.offload: "
        "cpu, more workers or a smaller model"
    )


def test_elastic_workers_fit_at_their_fewest_too() -> None:
    memory = Memory(SIZES, 19 * GIB)
    assert choose(recipe(workers=[4, 8]), workers=8, steps_per_epoch=1, memory=memory).stage == 1
    with pytest.raises(UserError, match=r"at stage 0 and micro-batch 1 each of 1 workers needs 18\.5 GiB"):
        choose(recipe(workers=[1, 8]), workers=8, steps_per_epoch=1, memory=memory)


def test_offloading_begins_at_stage_1_and_takes_less_of_a_device() -> None:
    asked = recipe(zero={"offload": "cpu"})
    assert choose(asked, workers=4, steps_per_epoch=1).stage == 1
    assert choose(asked, workers=4, steps_per_epoch=1, memory=Memory(SIZES, 80 * GIB)).stage == 1
    kept, moved = (need(SIZES, asked, stage=2, workers=4, micro_batch=1, offload=offload) for offload in (False, True))
    assert (moved.optimizer, moved.gradients) == (0, kept.gradients)
    assert moved.host == 3 * SIZES.trained + 2 * SIZES.trained  # masters and moments; the gradient, twice
    assert choose(asked, workers=4, steps_per_epoch=1, memory=Memory(SIZES, 5 * GIB)).stage == 3


def test_offloading_to_a_disk_takes_none_of_the_machines_memory() -> None:
    asked, other = (recipe(zero={"offload": offload}) for offload in ("nvme", "cpu"))
    assert choose(asked, workers=4, steps_per_epoch=1).stage == 1
    assert choose(asked, workers=4, steps_per_epoch=1, memory=Memory(SIZES, 5 * GIB)).stage == 3
    for stage in (1, 2, 3):
        found, cpu = (need(SIZES, each, stage=stage, workers=4, micro_batch=1, offload=True) for each in (asked, other))
        assert (found.host, found.disk, found.total) == (0, cpu.host, cpu.total)
    kept = need(SIZES, asked, stage=3, workers=4, micro_batch=1)
    assert (kept.host, kept.disk) == (0, 0)


def test_a_smaller_footprint_needs_no_sharding() -> None:
    lora = replace(SIZES, trained=GIB // 100)
    assert choose(recipe(), workers=4, steps_per_epoch=1, memory=Memory(lora, 8 * GIB)).stage == 0
