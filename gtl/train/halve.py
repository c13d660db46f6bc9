"""When a device has no room for a micro-batch: the run goes on with half of it, from its newest checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gtl.config import Recipe
from gtl.types import UserError

if TYPE_CHECKING:
    from gtl.storage import Store
    from gtl.train.plan import TrainPlan

HALVED = "halved.json"
"""In a run's folder: the largest micro-batch that is still to be tried."""


class HalvedError(RuntimeError):
    """A device ran out of memory; new workers go on with a smaller micro-batch. Its text is one line."""


@dataclass(frozen=True)
class Limit:
    """What a run has learned of its devices."""

    asked: int | str
    """The recipe's train.micro_batch then: with another one there is nothing known."""
    micro_batch: int
    """To be tried next."""
    times: int
    """That it was halved."""


def read_limit(run: Store) -> Limit | None:
    """What earlier workers of a run have found out."""
    return Limit(**json.loads(run.read(HALVED))) if run.exists(HALVED) else None


def limit(plan: TrainPlan, recipe: Recipe, workers: int, known: Limit | None) -> TrainPlan:
    """The plan with no larger micro-batch than is known to be worth a try, and with its own ZeRO stage."""
    if known is None or known.asked != recipe.train.micro_batch or plan.micro_batch <= known.micro_batch:
        return plan
    share = math.ceil(recipe.train.batch_size / workers)
    return replace(plan, micro_batch=known.micro_batch, accumulation=math.ceil(share / known.micro_batch))


@contextmanager
def halving(run: Store, recipe: Recipe, plan: TrainPlan) -> Iterator[None]:
    """Within it a device that runs out of memory halves the micro-batch of the run's next workers.

    Raises:
        HalvedError: they should be started.
        UserError: there is nothing to halve, or train.max_failures allows no more starts.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        train, size = recipe.train, plan.micro_batch
        known = read_limit(run)
        times = 1 if known is None or known.asked != train.micro_batch else known.times + 1
        if size == 1:
            raise UserError(f"train.micro_batch: 1: {no_room(recipe)}") from error
        run.write(HALVED, json.dumps(vars(Limit(train.micro_batch, size // 2, times))).encode())
        if times > train.max_failures:
            raise UserError(
                f"train.micro_batch: {size}: a worker ran out of memory, and train.max_failures: {train.max_failures} "
                f"allows no more starts; set it to {size // 2}"
            ) from error
        raise HalvedError(f"a worker ran out of memory with micro-batch {size}; on with {size // 2}") from error


def too_large(recipe: Recipe) -> str:
    """What helps a run that has no room for its model, or beside it for a single image."""
    return f"model.source: {recipe.model.source}: {no_room(recipe)}"


def no_room(recipe: Recipe) -> str:
    """What helps a run that has no room with any micro-batch."""
    train, highest = recipe.train, recipe.max_zero_stage
    more = "" if train.activation_checkpointing else "train.activation_checkpointing: true, "
    more += "" if train.zero.stage == highest else f"train.zero.stage: {highest} on more workers, "
    more += "" if train.zero.offload != "none" else "train.zero.offload: cpu, "
    return f"a worker ran out of memory; take {more}a smaller model or a lower data.resolution"
