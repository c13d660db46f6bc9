"""How much of the trials' order each key explains, held against what chance would."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gtl.config.space import Domain, label
from gtl.report.chart import short

Floats = NDArray[np.float64]

FEWEST = 6
"""Trials, of which fewer tell nothing."""
SHUFFLES = 2000
QUANTILE = 0.95
"""Of the shuffled shares: what chance stays below in 19 of 20."""
LEAF = 8
"""A part of a range has at least one in so many of the trials, and two."""
MOST_CUTS = 24
"""Places where a range may be cut; of more, some at even distances."""


@dataclass(frozen=True)
class Group:
    """Trials with the same listed value, or with values next to each other."""

    text: str
    """The values."""
    members: tuple[int, ...]
    """Positions of the trials."""


@dataclass(frozen=True)
class Importance:
    """What a key explains."""

    share: float
    """Of the variance of the places, beyond what shuffled values come to on average: 1 is all of it, 0 is chance."""
    chance: float
    """Share that shuffled values stay below in 19 of 20 shuffles."""
    groups: tuple[Group, ...]
    """Best first."""
    trials: int

    @property
    def is_clear(self) -> bool:
        """Whether it is more than chance explains."""
        return self.share > self.chance


def importance(domain: Domain, values: Sequence[Any], places: Sequence[float]) -> Importance | None:
    """How much of the trials' places a key explains by itself.

    The trials are parted: by the listed values, or a range in up to three by the cuts that explain most, so that a best
    value in the middle counts too. What that explains is the correlation ratio of the ranks, H / (n - 1) of Kruskal and
    Wallis (1952). Of it is taken what shuffled places come to on average, parted anew each time: for listed values
    that gives Kelley's epsilon squared (1935), for ranges it pays for the choice of the cuts (maximally selected rank
    statistics, Lausen & Schumacher 1992).

    Args:
        domain: How the key is drawn.
        values: Of the trials that have it.
        places: Theirs, the lowest is the best; equal ones are alike.

    Returns:
        None where there are fewer than FEWEST trials, all have one value, or all places are equal.
    """
    order = midranks(places)
    order -= order.mean() if len(order) else 0
    if len(values) < FEWEST or not order.any():
        return None
    shuffled = np.concatenate([order[None], np.random.default_rng(0).permuted(np.tile(order, (SHUFFLES, 1)), axis=1)])
    partings = listed(values) if domain.bounds is None else ranges(values)
    if not partings:
        return None
    explained = np.stack([between(shuffled, parting) for parting in partings])
    shares = explained.max(axis=0) / (order**2).sum()
    expected = shares[1:].mean()
    if expected > 1 - 1e-9:  # each trial has a value of its own
        return None
    share, chance = ((found - expected) / (1 - expected) for found in (shares[0], np.quantile(shares[1:], QUANTILE)))
    groups = sorted(partings[int(explained[:, 0].argmax())], key=lambda which: order[which].mean())
    return Importance(
        max(0.0, float(share)), float(chance),
        tuple(Group(span(domain, [values[i] for i in which]), tuple(which)) for which in groups), len(values),
    )  # fmt: skip


def between(places: Floats, parting: Sequence[list[int]]) -> Floats:
    """Sum of squares between groups. places: [shuffles, trials], of mean 0 -> [shuffles]."""
    return np.asarray(sum(places[:, which].sum(axis=1) ** 2 / len(which) for which in parting))


def listed(values: Sequence[Any]) -> list[list[list[int]]]:
    """The one way to part listed values; none if there is one value only."""
    found: dict[str, list[int]] = {}
    for i, value in enumerate(values):
        found.setdefault(label(value), []).append(i)
    return [list(found.values())] if len(found) > 1 else []


def ranges(values: Sequence[float]) -> list[list[list[int]]]:
    """All ways to cut a range in two or three."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    least = max(2, len(values) // LEAF)
    cuts = [i for i in range(least, len(values) - least + 1) if values[order[i - 1]] < values[order[i]]]
    if len(cuts) > MOST_CUTS:
        cuts = [cuts[i * len(cuts) // MOST_CUTS] for i in range(MOST_CUTS)]
    return [[order[:i], order[i:]] for i in cuts] + [
        [order[:i], order[i:j], order[j:]] for i, j in itertools.combinations(cuts, 2) if j - i >= least
    ]


def span(domain: Domain, values: Sequence[Any]) -> str:
    """The values of a group."""
    if domain.bounds is None:
        return label(values[0])
    return " to ".join(short(float(f"{end:.3g}")) for end in dict.fromkeys([min(values), max(values)]))


def midranks(values: Sequence[float]) -> Floats:
    """1 for the lowest; equal ones share the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse])
