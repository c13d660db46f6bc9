"""Which trials are best: by one metric, by several at once, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gtl.evaluate.result import compare
from gtl.report.chart import short
from gtl.report.evaluations import interval
from gtl.report.ranking import Directions, Outcome, front, measured, rank
from gtl.types import UserError

if TYPE_CHECKING:
    from gtl.evaluate.estimate import Difference
    from gtl.evaluate.result import Evaluation, Score

__all__ = ["Outcome", "Winner", "crowding", "front", "rank", "top", "winner"]


def top(outcomes: Sequence[Outcome], directions: Directions, number: int) -> list[Outcome]:
    """The best so many, best first.

    Of a Pareto front with more than that, its ends and then what lies farthest from its neighbours (crowding distance,
    Deb et al. 2002), so that the choice spans the front.
    """
    if len(directions) == 1:
        return rank(outcomes, directions)[:number]
    chosen: list[Outcome] = []
    left = measured(outcomes, directions)
    while left and len(chosen) < number:
        ahead = front(left, directions)
        spread = crowding(ahead, directions)
        order = sorted(range(len(ahead)), key=lambda position: -spread[position])
        chosen += [ahead[position] for position in sorted(order[: number - len(chosen)])]
        left = [outcome for outcome in left if outcome not in ahead]
    return chosen


def crowding(outcomes: Sequence[Outcome], directions: Directions) -> list[float]:
    """How far each is from its neighbours on a front, summed over metrics, in shares of their range; ends: infinity."""
    gains = [outcome.gains(directions) for outcome in outcomes]
    distance = [0.0] * len(gains)
    for metric in range(len(directions)):
        order = sorted(range(len(gains)), key=lambda position: gains[position][metric])
        low, high = gains[order[0]][metric], gains[order[-1]][metric]
        distance[order[0]] = distance[order[-1]] = math.inf
        for before, here, behind in zip(order, order[1:], order[2:], strict=False):
            if high > low:
                distance[here] += (gains[behind][metric] - gains[before][metric]) / (high - low)
    return distance


@dataclass(frozen=True)
class Winner:
    """The best of the trials that were measured again, and whether chance may have made it so."""

    trial: str
    metric: str
    score: Score
    """On seeds that no trial was chosen by."""
    runner_up: str | None
    """None if nobody else was measured again."""
    difference: Difference | None
    """Its score less the runner-up's, pair by pair of the same prompt and seed."""
    tied: tuple[str, ...]
    """Trials that cannot be told from it: their difference is within what chance explains, or has no interval."""

    @property
    def is_clear(self) -> bool:
        """Whether it is better than the runner-up beyond what chance explains."""
        return self.difference is not None and self.difference.better == 0

    def __str__(self) -> str:
        """In one line, for people."""
        text = f"{self.trial}: {self.metric} {short(self.score.value)} ({interval(self.score.low, self.score.high)})"
        if self.difference is None:
            return text
        by = f"{self.difference.value:+.4g} ({interval(self.difference.low, self.difference.high)})"
        told = "better than" if self.is_clear else "not to be told from"
        return f"{text}, {told} {self.runner_up}: {by}"


def winner(evaluations: Mapping[str, Evaluation], metric: str) -> Winner:
    """The best by a metric of trials that were measured again, on the same fresh seeds.

    Its interval against the runner-up is of 95 % for these two; that it was picked among k is not in it, so with many
    trials a difference that is just clear is a weak sign. Of equal ones the first given wins.

    Args:
        evaluations: Trial -> what `gtl evaluate` makes of it, in the order of the search.
        metric: Of `gtl.config.metrics.METRICS`.

    Raises:
        UserError: no evaluation has the metric, or they were drawn in several ways.
    """
    scores = {trial: found.scores[metric] for trial, found in evaluations.items() if metric in found.scores}
    scores = {trial: score for trial, score in scores.items() if math.isfinite(score.value)}
    if not scores:
        raise UserError(f"metric: {metric}: no trial that was measured again has it; see evaluate.metrics")
    sign = 1 if next(iter(scores.values())).higher_is_better else -1
    best, *others = sorted(scores, key=lambda trial: -sign * scores[trial].value)
    differences = {trial: difference(evaluations[trial], evaluations[best], metric) for trial in others}
    tied = tuple(trial for trial, found in differences.items() if found is None or found.better != 0)
    runner_up = others[0] if others else None
    against = differences[runner_up] if runner_up else None
    return Winner(best, metric, scores[best], runner_up, against, tied)


def difference(other: Evaluation, best: Evaluation, metric: str) -> Difference | None:
    """The best's score less another's; None if they were made by two extractors. Trials may differ in their steps."""
    return next((found for found in compare(other, best, ("steps",)) if found.metric == metric), None)
