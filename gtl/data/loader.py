"""One rank's batches, made in the background while the step before them runs."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from gtl.data.dataset import Dataset
from gtl.data.plan import Place, Plan, places
from gtl.types import Batch, Item, PlanItem

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Draw = Callable[[Item, torch.Generator], dict[str, Tensor]]
    Collate = Callable[[Sequence[dict[str, Tensor]]], dict[str, Tensor]]

AHEAD = 3
"""Steps that are prepared in advance."""


class Loader:
    """Iterates over `(step, micro-batches)` of one rank from `first_step` up to, not including, `last_step`.

    What is drawn for a sample depends on the seed, the step and its place in the global batch only, not on the ranks.
    """

    def __init__(
        self, dataset: Dataset, plan: Plan, objective_draw: Draw, objective_collate: Collate, *,
        rank: int, world: int, micro_batch: int, first_step: int, last_step: int, seed: int, pin: bool = False,
    ) -> None:  # fmt: skip
        """The last two steps and the seed are the run's; the rest is this rank's view of it. `pin` is for GPUs."""
        self._dataset, self._plan = dataset, plan
        self._draw, self._collate = objective_draw, objective_collate
        self._places = places(plan.batch_size, rank, world, micro_batch)
        self._steps = range(first_step, last_step)
        self._seed = seed
        self._pin = pin
        self.waited = 0.0
        """Seconds in all that the consumer has waited for data."""

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        ready: queue.Queue[tuple[int, list[Batch]] | BaseException] = queue.Queue(AHEAD)
        stop = threading.Event()
        thread = threading.Thread(target=self._produce, args=(ready, stop), name="gtl-loader", daemon=True)
        thread.start()
        try:
            for _ in self._steps:
                begun = time.perf_counter()
                result = ready.get()
                self.waited += time.perf_counter() - begun
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            stop.set()
            thread.join()

    def _produce(self, ready: queue.Queue[tuple[int, list[Batch]] | BaseException], stop: threading.Event) -> None:
        for step in self._steps:
            result: tuple[int, list[Batch]] | BaseException
            try:
                result = step, self.batches(step)
            except Exception as error:  # raised again by the consumer
                result = error
            while not stop.is_set():
                try:
                    ready.put(result, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if stop.is_set() or isinstance(result, BaseException):
                return

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step."""
        items = self._plan.batch(step)
        mine = {place.position for row in self._places for place in row}
        samples = {position: self._sample(step, position, items[position]) for position in mine}
        return [self._batch(row, items, samples) for row in self._places]

    def _batch(self, row: list[Place], items: list[PlanItem], samples: dict[int, dict[str, Tensor]]) -> Batch:
        import torch

        weights = [items[place.position].weight if place.is_real else 0.0 for place in row]
        keys = tuple(self._dataset.entries[items[p.position].entry].variants[items[p.position].variant] for p in row)
        batch = Batch(self._collate([samples[p.position] for p in row]), torch.tensor(weights), keys)
        return batch.pin() if self._pin else batch

    def _sample(self, step: int, position: int, item: PlanItem) -> dict[str, Tensor]:
        import torch

        digest = hashlib.blake2b(f"{self._seed} {step} {position}".encode(), digest_size=8).digest()
        rng = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        return self._draw(self._dataset.item(item.entry, item.variant, item.caption), rng)
