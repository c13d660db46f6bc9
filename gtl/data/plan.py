"""Which images make up which step: a pure function of the dataset, the seed and the step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gtl.types import Entry, PlanItem, UserError

Ints = NDArray[np.int64]


class _Epoch(NamedTuple):
    order: Ints
    """Entries, batch after batch."""
    starts: Ints
    """Where batch i begins in `order`; one more than there are batches."""
    variants: Ints
    captions: Ints


class Plan:
    """The global batches of a run.

    Every batch has exactly `batch_size` items of one bucket; a short remainder is filled with repeats of weight 0. An
    epoch has every entry of the subject exactly once with a weight above 0, and where there are class images, as many
    of them (DreamBooth, arXiv 2208.12242, pairs them so): they go round in order over the epochs, whichever is more.

    Where some entries are of a target domain, they are spread evenly over each bucket's: of any w items in a row of a
    batch, k of n being the bucket's share of them, floor(w k / n) or one more are.
    """

    def __init__(self, entries: Sequence[Entry], batch_size: int, seed: int) -> None:
        """Group the entries by bucket. Class images have one size, so they have to share a bucket."""
        subject = [i for i, entry in enumerate(entries) if not entry.record.is_class_image]
        class_images = [i for i, entry in enumerate(entries) if entry.record.is_class_image]
        shapes = {entries[i].bucket for i in class_images}
        if not subject or batch_size < 1 or len(shapes) > 1:
            raise ValueError(f"{len(subject)} entries in batches of {batch_size}, class images in {len(shapes)} shapes")
        self.batch_size = batch_size
        self.seed = seed
        self.num_entries = len(entries)
        members: dict[tuple[int, int], list[int]] = {}
        for i in subject:
            members.setdefault(entries[i].bucket, []).append(i)
        # Numbers beyond the entries stand for an epoch's class images, so that all epochs have the same batches.
        for shape in shapes:
            members.setdefault(shape, []).extend(range(len(entries), len(entries) + len(subject)))
        self._num_subject = len(subject)
        self._class_images = np.array(class_images, dtype=np.int64)
        self._is_target = np.array([entry.record.is_target for entry in entries])
        self._buckets = [np.array(members[bucket], dtype=np.int64) for bucket in sorted(members)]
        self._weights = np.array([entry.record.weight for entry in entries], dtype=np.float64)
        self._num_variants = np.array([len(entry.variants) for entry in entries], dtype=np.uint64)
        # One draw an entry also where captions play no part.
        self._num_captions = np.array([len(entry.record.captions) or 1 for entry in entries], dtype=np.uint64)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the subject, with as many class images if there are any."""
        return sum(-(-len(bucket) // self.batch_size) for bucket in self._buckets)

    def batch(self, step: int) -> list[PlanItem]:
        """The global batch of a step, counted from 0 over all epochs."""
        number, position = divmod(step, self.steps_per_epoch)
        epoch = self._epoch(number)
        entries = epoch.order[epoch.starts[position] : epoch.starts[position + 1]]
        items = [
            PlanItem(int(e), int(epoch.variants[e]), int(epoch.captions[e]), float(self._weights[e]) / len(entries))
            for e in entries
        ]
        fillers = [items[i % len(items)]._replace(weight=0.0) for i in range(len(items), self.batch_size)]
        return items + fillers

    def _draw_epoch(self, number: int) -> _Epoch:
        # Raw draws of a bit generator are the same in every numpy version; a Generator's shuffle is not.
        bits = np.random.PCG64(np.random.SeedSequence([self.seed & (2**64 - 1), number]))
        parts: list[Ints] = []
        for bucket in self._buckets:
            shuffled = bucket[np.argsort(bits.random_raw(len(bucket)), kind="stable")]
            if self._is_target.any():
                shuffled = spread(shuffled, self._is_target[shuffled])
            parts += [shuffled[i : i + self.batch_size] for i in range(0, len(shuffled), self.batch_size)]
        parts = [parts[i] for i in np.argsort(bits.random_raw(len(parts)), kind="stable")]
        order = np.concatenate(parts)
        if len(self._class_images):
            paired = order >= self.num_entries
            turns = order[paired] - self.num_entries + number * self._num_subject
            order[paired] = self._class_images[turns % len(self._class_images)]
        return _Epoch(
            order=order,
            starts=np.cumsum([0, *map(len, parts)]),
            variants=(bits.random_raw(self.num_entries) % self._num_variants).astype(np.int64),
            captions=(bits.random_raw(self.num_entries) % self._num_captions).astype(np.int64),
        )


def spread(order: Ints, chosen: NDArray[np.bool_]) -> Ints:
    """Both kinds in the order that they are in, with the chosen ones at equal distances among the others."""
    before = np.arange(len(order) + 1) * chosen.sum() // len(order)
    turns = np.diff(before) > 0
    mixed = np.empty_like(order)
    mixed[turns], mixed[~turns] = order[chosen], order[~chosen]
    return mixed


class Place(NamedTuple):
    """One place of a rank's micro-batch."""

    position: int
    """In the global batch."""
    is_real: bool
    """False for a repeat that only fills the shape."""


def places(num_items: int, rank: int, world: int, micro_batch: int) -> list[list[Place]]:
    """A rank's share of a global batch as micro-batches of one size, the same on every rank and at most `micro_batch`.

    Shares are contiguous and differ by at most one item before they are filled up.
    """
    count, size = passes(num_items, world, micro_batch)
    whole, more = divmod(num_items, world)
    start = rank * whole + min(rank, more)
    mine = [Place(start + i, True) for i in range(whole + (rank < more))]
    fill = Place(mine[-1].position if mine else 0, False)
    mine += [fill] * (count * size - len(mine))
    return [mine[i : i + size] for i in range(0, len(mine), size)]


def passes(num_items: int, world: int, micro_batch: int) -> tuple[int, int]:
    """How many micro-batches each rank makes of a global batch, and how many places each of them has."""
    share = -(-num_items // world)
    count = -(-share // micro_batch)
    return count, -(-share // count)


def num_fills(num_items: int, world: int, micro_batch: int) -> int:
    """Places of all ranks beyond a global batch's items, each of which costs as much as an item."""
    count, size = passes(num_items, world, micro_batch)
    return world * count * size - num_items


def check_domains(
    entries: Sequence[Entry], batch_size: int, fewest: int, world: int = 1, micro_batch: int | None = None
) -> None:
    """Refuse batches that do not hold both domains.

    Args:
        entries: Those that are trained on.
        batch_size: Images of a global batch.
        fewest: Of each domain in a batch; with a `micro_batch`, in every one of its parts that is not cut short by the
            end of an epoch.
        world: Ranks.
        micro_batch: Images of a forward pass of one of them, at most.

    Raises:
        UserError: they do not.
    """
    where, size = f"train.batch_size: {batch_size}", batch_size
    if micro_batch is not None:
        rows = [row for rank in range(world) for row in places(batch_size, rank, world, micro_batch)]
        where, size = f"train.micro_batch: {micro_batch}", min(sum(place.is_real for place in row) for row in rows)
    buckets: dict[tuple[int, int], list[bool]] = {}
    for entry in entries:
        buckets.setdefault(entry.bucket, []).append(entry.record.is_target)
    for (height, width), found in sorted(buckets.items()):
        targets, of = sum(found), len(found)
        if size * min(targets, of - targets) // of < fewest:
            raise UserError(
                f"{where}: {targets} of {of} images of {width}x{height} pixels are of objective.target, so that not "
                f"every {size} in a row hold {fewest} of each domain; raise it, give the rarer domain repeats"
                + (", or set data.buckets: false" if len(buckets) > 1 else "")
            )


def slice_for(items: Sequence[PlanItem], rank: int, world: int, micro_batch: int) -> list[list[PlanItem]]:
    """The items of `places`; a fill has weight 0."""
    return [
        [items[p.position] if p.is_real else items[p.position]._replace(weight=0.0) for p in row]
        for row in places(len(items), rank, world, micro_batch)
    ]
