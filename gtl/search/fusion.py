"""How much of each adapter: weights of a sum that draw best by a metric, found by drawing with all of them at once."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gtl.adapters import Registry
from gtl.config.metrics import METRICS, of_pictures
from gtl.config.names import parse_reference
from gtl.evaluate.result import Evaluation, compare_by
from gtl.evaluate.run import check, evaluate
from gtl.report.chart import short
from gtl.report.evaluations import interval
from gtl.report.text import columns
from gtl.search.study import FRESH
from gtl.session import session
from gtl.types import Progress, UserError, quiet

if TYPE_CHECKING:
    from gtl.config import Recipe
    from gtl.evaluate.estimate import Difference

Weights = tuple[float, ...]
"""One for each adapter; 0 leaves it out."""
LARGEST = 1.25
"""More than once an adapter's own strength; what is far above it draws broken pictures."""
STEP = 0.05


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    adapters: tuple[str, ...]
    """NAME@VERSION, in the order of the weights."""
    metric: str
    tried: tuple[tuple[Weights, Evaluation], ...]
    """Best first."""
    single: Weights
    """The best adapter by itself."""
    again: Difference
    """The best weights less the best single adapter, both drawn once more on fresh seeds."""

    @property
    def best(self) -> Weights:
        """Those that drew best."""
        return self.tried[0][0]


def search_weights(
    recipe: Recipe, adapters: Sequence[str], metric: str | None = None, *, tries: int = 16, seed: int = 0,
    progress: Progress = quiet,
) -> Found:  # fmt: skip
    """Draw with adapters at different weights, as the recipe's `evaluate` says, and find those that score best.

    Each adapter alone, all in full and all in equal shares come first, then random weights. Weights were chosen for
    what they scored, so the best is drawn again on fresh seeds, beside the best adapter alone, before it is said to be
    better.

    Args:
        recipe: Says what is drawn, what it is compared with, and where the adapters are.
        adapters: NAME[@VERSION|@ALIAS] of each, two or more.
        metric: Of pictures; None: the first of the recipe's.
        tries: Weights to try.
        seed: Of the random ones.
        progress: Is called as it goes on.

    Raises:
        UserError: a weight is given already, there are too few tries, the metric is none of pictures, or as for
            `gtl.evaluate.run.evaluate`.
    """
    number = len(adapters)
    if number < 2:
        raise UserError(f"fuse: {number} adapter; expected two or more, each NAME[@VERSION|@ALIAS]")
    for reference in adapters:
        if parse_reference(reference).scale != 1:
            raise UserError(f"adapter {reference}: has a weight, and --search finds one; leave it out")
    if tries < number + 2:
        raise UserError(f"--tries: {tries}: expected at least {number + 2}: each alone, all in full, all in shares")
    metric = metric or recipe.evaluate.metrics[0]
    if metric not in (known := of_pictures(METRICS)):
        raise UserError(f"--metric: {metric}: is not of pictures; expected one of {', '.join(known)}")
    shelf = Registry(recipe.storage.registry)
    for reference in adapters:
        if (kind := shelf.show(reference).kind) != "lora":
            raise UserError(f"adapter {reference}: is a {kind}; --search is for LoRAs, which draw as their sum")
    asked = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"metrics": [metric]})})
    check(asked)
    tried = list(candidates(number, tries, seed))
    with session():
        scored = evaluate(asked, [at(adapters, weights) for weights in tried], progress=progress)
        sign = METRICS[metric].sign
        order = sorted(zip(tried, scored, strict=True), key=lambda each: -sign * each[1].scores[metric].value)
        single = next(weights for weights, _ in order if sum(weight != 0 for weight in weights) == 1)
        fresh = asked.evaluate.model_copy(update={"seed": asked.evaluate.seed + FRESH})
        both = [at(adapters, weights) for weights in (single, order[0][0])]
        first, second = evaluate(asked.model_copy(update={"evaluate": fresh}), both, progress=progress)
    again = compare_by(metric, first, second)
    return Found(tuple(adapters), metric, tuple(order), single, again)


def candidates(number: int, tries: int, seed: int) -> Iterator[Weights]:
    """Each alone, all in full, all in equal shares, then random ones; no weights twice."""
    seen: set[Weights] = set()
    for alone in range(number):
        seen.add(weights := tuple(float(alone == other) for other in range(number)))
        yield weights
    rng = random.Random(seed)
    fixed = iter([(1.0,) * number, (round(1 / number, 3),) * number])
    while len(seen) < tries:
        drawn = tuple(round(rng.uniform(STEP, LARGEST) / STEP) * STEP for _ in range(number))
        weights = next(fixed, tuple(round(weight, 3) for weight in drawn))
        if weights not in seen:
            seen.add(weights)
            yield weights


def at(adapters: Sequence[str], weights: Weights) -> list[str]:
    """The adapters that take part, each with its weight."""
    return [str(parse_reference(name)._replace(scale=weight))
            for name, weight in zip(adapters, weights, strict=True) if weight]  # fmt: skip


def table(found: Found) -> str:
    """What was tried, best first, and how sure the best is."""
    rows = [[*found.adapters, found.metric, "95 % interval"]]
    for weights, evaluation in found.tried:
        score = evaluation.scores[found.metric]
        rows.append([*map(short, weights), short(score.value), interval(score.low, score.high)])
    again, alone = found.again, found.adapters[found.single.index(max(found.single))]
    verdict = {None: "cannot be told from it", 0: "better", 1: "worse"}[again.better]
    sure = f"{again.value:+.3g} ({interval(again.low, again.high)}) against {alone} alone on fresh seeds: {verdict}"
    return f"{columns(rows)}\n\n{sure}"
