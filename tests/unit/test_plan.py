import math
import time
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtl.data.plan import Plan, num_fills, places, slice_for
from gtl.types import Entry, PlanItem, Record

BUCKETS = [(64, 64), (48, 80), (80, 48), (56, 72)]


def make_entries(buckets: list[int], weights: list[float] | None = None) -> list[Entry]:
    return [
        Entry(
            Record(f"{i}.jpg", f"{i}", (64, 64), ("a", "b", "c")[: 1 + i % 3], weights[i] if weights else 1.0),
            BUCKETS[bucket],
            ("x", "y")[: 1 + i % 2],
        )
        for i, bucket in enumerate(buckets)
    ]


datasets = st.lists(st.integers(0, 3), min_size=1, max_size=40).map(make_entries)
batch_sizes = st.integers(1, 9)
seeds = st.integers(0, 2**32)


@given(datasets, batch_sizes, seeds, st.integers(0, 3))
def test_every_entry_counts_exactly_once_an_epoch(entries: list[Entry], size: int, seed: int, epoch: int) -> None:
    plan = Plan(entries, size, seed)
    first = epoch * plan.steps_per_epoch
    batches = [plan.batch(step) for step in range(first, first + plan.steps_per_epoch)]
    counted = Counter(item.entry for batch in batches for item in batch if item.weight > 0)
    assert counted == {i: 1 for i in range(len(entries))}


@given(datasets, batch_sizes, seeds, st.integers(0, 50))
def test_a_batch_has_its_size_one_bucket_and_weights_that_sum_to_one(
    entries: list[Entry], size: int, seed: int, step: int
) -> None:
    batch = Plan(entries, size, seed).batch(step)
    assert len(batch) == size
    assert len({entries[item.entry].bucket for item in batch}) == 1
    assert sum(item.weight for item in batch) == pytest.approx(1)
    for item in batch:
        assert 0 <= item.variant < len(entries[item.entry].variants)
        assert 0 <= item.caption < len(entries[item.entry].record.captions)


@given(datasets, batch_sizes, seeds)
def test_steps_per_epoch_fills_every_bucket_up(entries: list[Entry], size: int, seed: int) -> None:
    counts = Counter(entry.bucket for entry in entries)
    assert Plan(entries, size, seed).steps_per_epoch == sum(-(-count // size) for count in counts.values())


@given(datasets, batch_sizes, seeds, st.integers(0, 30), st.integers(1, 8), st.integers(1, 4))
def test_ranks_together_have_the_global_batch_in_equal_shapes(
    entries: list[Entry], size: int, seed: int, step: int, world: int, micro_batch: int
) -> None:
    batch = Plan(entries, size, seed).batch(step)
    ranks = [slice_for(batch, rank, world, micro_batch) for rank in range(world)]
    assert len({tuple(map(len, rank)) for rank in ranks}) == 1
    assert len(set(map(len, ranks[0]))) == 1
    assert len(ranks[0][0]) <= micro_batch
    assert len(ranks[0]) == math.ceil(math.ceil(size / world) / micro_batch)
    real = [item for rank in ranks for row in rank for item in row if item.weight > 0]
    assert real == [item for item in batch if item.weight > 0]
    found = [place for r in range(world) for row in places(size, r, world, micro_batch) for place in row]
    assert [place.position for place in found if place.is_real] == list(range(size))


@given(datasets, batch_sizes, seeds, st.lists(st.integers(0, 40), max_size=8))
def test_a_batch_depends_on_nothing_but_its_step(
    entries: list[Entry], size: int, seed: int, others: list[int]
) -> None:
    used = Plan(entries, size, seed)
    for step in others:
        used.batch(step)
    assert used.batch(11) == Plan(entries, size, seed).batch(11)


def test_the_plan_of_a_seed_stays_what_it_is() -> None:
    plan = Plan(make_entries([0, 0, 0, 1, 1]), 2, seed=0)
    assert plan.steps_per_epoch == 3
    assert [plan.batch(step) for step in range(3)] == [
        [PlanItem(1, 1, 1, 0.5), PlanItem(0, 0, 0, 0.5)],
        [PlanItem(2, 0, 2, 1.0), PlanItem(2, 0, 2, 0.0)],
        [PlanItem(4, 0, 0, 0.5), PlanItem(3, 0, 0, 0.5)],
    ]


def test_a_weight_is_divided_by_the_number_of_real_items() -> None:
    plan = Plan(make_entries([0, 0, 0], weights=[1.0, 1.0, 0.25]), 4, seed=3)
    weights = {item.entry: item.weight for item in plan.batch(0) if item.weight}
    assert weights == {0: 1 / 3, 1: 1 / 3, 2: 0.25 / 3}
    assert [item.weight for item in plan.batch(0)].count(0.0) == 1


def with_class_images(num_subject: int, num_class: int, weight: float = 1.0, shape: int = 0) -> list[Entry]:
    """A subject in two buckets, and class images in one."""
    subject = make_entries([i % 2 for i in range(num_subject)])
    drawn = make_entries([shape] * num_class, [weight] * num_class)
    return subject + [replace(entry, record=replace(entry.record, is_class_image=True)) for entry in drawn]


def count_epoch(plan: Plan, epoch: int) -> Counter[int]:
    """How often every entry counts."""
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return Counter(item.entry for step in steps for item in plan.batch(step) if item.weight > 0)


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 2), batch_sizes, seeds, st.integers(0, 5))
def test_an_epoch_pairs_the_subject_with_as_many_class_images(
    num_subject: int, num_class: int, shape: int, size: int, seed: int, epoch: int
) -> None:
    plan = Plan(with_class_images(num_subject, num_class, shape=shape), size, seed)
    counted = count_epoch(plan, epoch)
    assert all(counted[i] == 1 for i in range(num_subject))
    assert counted.total() == 2 * num_subject
    turns = range(epoch * num_subject, (epoch + 1) * num_subject)
    assert counted - Counter(range(num_subject)) == Counter(num_subject + turn % num_class for turn in turns)


def test_class_images_go_round_over_the_epochs() -> None:
    plan = Plan(with_class_images(5, 12), 4, seed=1)
    shown = [sorted(i - 5 for i in count_epoch(plan, epoch).elements() if i >= 5) for epoch in range(3)]
    assert shown == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [0, 1, 2, 10, 11]]
    fewer = count_epoch(Plan(with_class_images(5, 2), 4, seed=1), 0)
    assert (fewer[5], fewer[6]) == (3, 2)


def test_a_hundred_class_images_weigh_as_much_as_five_photographs() -> None:
    plan = Plan(with_class_images(5, 100, weight=0.5, shape=2), 4, seed=1)
    assert plan.steps_per_epoch == 2 + 2  # three and two photographs, five class images
    shares = {True: 0.0, False: 0.0}
    for step in range(plan.steps_per_epoch):
        for item in plan.batch(step):
            shares[item.entry >= 5] += item.weight
    assert shares == {False: pytest.approx(2.0), True: pytest.approx(0.5 * 2.0)}


def test_class_images_need_a_subject_and_one_shape() -> None:
    with pytest.raises(ValueError, match="^0 entries in batches of 2, class images in 1 shapes$"):
        Plan(with_class_images(0, 3), 2, seed=0)
    with pytest.raises(ValueError, match="^1 entries in batches of 2, class images in 2 shapes$"):
        Plan([*with_class_images(1, 3), *with_class_images(0, 1, shape=1)], 2, seed=0)


def test_epochs_and_seeds_differ() -> None:
    entries = make_entries([0] * 32)
    orders = [
        tuple(item.entry for step in range(first, first + 4) for item in Plan(entries, 8, seed).batch(step))
        for first, seed in [(0, 0), (4, 0), (0, 1)]
    ]
    assert len(set(orders)) == 3


def test_variants_and_captions_are_drawn_anew_every_epoch() -> None:
    plan = Plan(make_entries([0] * 6), 6, seed=0)
    drawn = {(item.variant, item.caption) for epoch in range(40) for item in plan.batch(epoch) if item.entry == 5}
    assert drawn == {(variant, caption) for variant in range(2) for caption in range(3)}


def test_a_slice_of_fewer_items_than_ranks_is_filled() -> None:
    item = PlanItem(7, 0, 0, 0.5)
    assert slice_for([item, item._replace(entry=8)], rank=2, world=3, micro_batch=4) == [[item._replace(weight=0.0)]]


@pytest.mark.parametrize(
    ("num_items", "world", "micro_batch", "number"),
    [(4, 1, 4, 0), (4, 2, 1, 0), (4, 3, 2, 2), (5, 1, 3, 1), (32, 3, 4, 4), (1, 3, 1, 2)],
)
def test_what_is_filled_up_is_counted(num_items: int, world: int, micro_batch: int, number: int) -> None:
    assert num_fills(num_items, world, micro_batch) == number
    rows = [row for rank in range(world) for row in places(num_items, rank, world, micro_batch)]
    assert sum(not place.is_real for row in rows for place in row) == number


def test_a_million_entries() -> None:
    entry = make_entries([0])[0]
    begun = time.perf_counter()
    plan = Plan([entry] * 1_000_000, 64, seed=0)
    plan.batch(plan.steps_per_epoch + 5)
    assert time.perf_counter() - begun < 20
    begun = time.perf_counter()
    for step in range(100):
        plan.batch(step)
    assert time.perf_counter() - begun < 5
