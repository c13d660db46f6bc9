"""Which trials are ahead: by one metric, or by several at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Directions = Mapping[str, Literal["min", "max"]]
"""Metric -> which way is better; the first one decides where one has to."""


@dataclass(frozen=True)
class Outcome:
    """What a trial came to."""

    trial: str
    metrics: Mapping[str, float | None]
    """None or not a finite number where it failed, or was never measured."""

    def gains(self, directions: Directions) -> tuple[float, ...]:
        """Its numbers, turned so that more is better."""
        values = (self.metrics.get(name) for name in directions)
        turned = zip(values, directions.values(), strict=True)
        return tuple(math.nan if v is None else v if mode == "max" else -v for v, mode in turned)


def measured(outcomes: Sequence[Outcome], directions: Directions) -> list[Outcome]:
    """Those with a finite number of every metric, in their order."""
    return [outcome for outcome in outcomes if all(map(math.isfinite, outcome.gains(directions)))]


def rank(outcomes: Sequence[Outcome], directions: Directions) -> list[Outcome]:
    """Best first, those that were not measured left out.

    By several metrics the Pareto front comes first, then the front of what is left, and so on (non-dominated sorting,
    Deb et al. 2002), each by the first metric. Equal ones stay in their order.
    """
    ranked: list[Outcome] = []
    left = measured(outcomes, directions)
    if len(directions) == 1:
        return sorted(left, key=lambda outcome: outcome.gains(directions), reverse=True)
    while left:
        ahead = front(left, directions)
        ranked += ahead
        left = [outcome for outcome in left if outcome not in ahead]
    return ranked


def front(outcomes: Sequence[Outcome], directions: Directions) -> list[Outcome]:
    """The Pareto front: those that no other is better than in one metric without being worse in another.

    Best by the first metric first. Of several with the same numbers all are in it; by one metric it is the best.
    """
    whole = measured(outcomes, directions)
    gains = [outcome.gains(directions) for outcome in whole]
    ahead = [
        outcome for outcome, own in zip(whole, gains, strict=True) if not any(dominates(other, own) for other in gains)
    ]
    return sorted(ahead, key=lambda outcome: outcome.gains(directions), reverse=True)


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether the first gains are nowhere less than the second and somewhere more."""
    return all(a >= b for a, b in zip(one, other, strict=True)) and any(a > b for a, b in zip(one, other, strict=True))
