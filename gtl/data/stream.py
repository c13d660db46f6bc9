"""Running work over Ray Data: JSON values in, JSON values out as they are done."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from gtl.types import UserError

COLUMN = "json"
MISTAKE = "mistake"
"""Key of a result that carries a user's mistake, which Ray would wrap in errors of its own if it were raised."""


def run(work: Sequence[Any], function: Callable[..., Any], *, calls: int) -> Iterator[Any]:
    """Results of a function over the work, which is cut into about `calls` equal parts.

    The function takes a batch and yields batches; see `unpack` and `pack`.

    Raises:
        UserError: a result is a mistake of the user's.
    """
    yield from _results(work, calls, function, num_cpus=1)


def run_actors(
    work: Sequence[Any], actor: type, arguments: tuple[Any, ...], *, calls: int, actors: int, gpus: int
) -> Iterator[Any]:
    """As `run`, by a pool of up to `actors` objects made with the arguments, each with so many GPUs.

    Raises:
        UserError: a result is a mistake of the user's.
    """
    from ray.data import ActorPoolStrategy

    pool = ActorPoolStrategy(min_size=1, max_size=actors)
    yield from _results(work, calls, actor, compute=pool, fn_constructor_args=arguments, num_cpus=1, num_gpus=gpus)


def _results(work: Sequence[Any], calls: int, function: Callable[..., Any], **options: Any) -> Iterator[Any]:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    calls = max(1, min(calls, len(work)))
    bounds = [len(work) * i // calls for i in range(calls + 1)]
    parts = [{COLUMN: json.dumps(work[start:stop])} for start, stop in pairwise(bounds)]
    # A row a call: with GPUs Ray Data wants a batch size, to which it would join or cut parts of other lengths.
    dataset = ray.data.from_items(parts, override_num_blocks=calls).map_batches(function, batch_size=1, **options)
    for row in dataset.iter_rows():
        value = json.loads(row[COLUMN])
        if isinstance(value, dict) and MISTAKE in value:
            raise UserError(value[MISTAKE])
        yield value


def unpack(batch: dict[str, Any]) -> list[Any]:
    """The part of the work that is in a batch."""
    (part,) = batch[COLUMN]
    values: list[Any] = json.loads(part)
    return values


def pack(values: Sequence[Any]) -> dict[str, list[str]]:
    """A batch of results."""
    return {COLUMN: [json.dumps(value) for value in values]}


def each(function: Callable[[Any], Any], values: Sequence[Any], threads: int = 8) -> list[Any]:
    """The function's results over values, several at a time; a user's mistake becomes a result."""
    from concurrent.futures import ThreadPoolExecutor

    def call(value: Any) -> Any:
        try:
            return function(value)
        except UserError as error:
            return {MISTAKE: str(error)}

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(call, values))
