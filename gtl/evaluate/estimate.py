"""A score with how sure it is, and the difference of two: one mechanism for all metrics.

A score is a function of two sets of samples, and each sample has an *influence* on it: how the score moves with that
sample's share in its set. Those of a mean are the values less their mean. A score that is no mean varies from draw to
draw like the mean of its influences, which gives its standard error (the infinitesimal jackknife, Jaeckel 1972; Efron
1982, chapter 6), and as samples are paired so are their influences, which gives the error of a difference.

The samples count as independent draws. Where a prompt has several, the interval is one for other seeds of these
prompts, and rather too wide for that; for other prompts it is too narrow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gtl.config.metrics import metric
from gtl.evaluate.intervals import NORMAL, student_t, wilson
from gtl.types import UserError

FEWEST = 8
"""Samples of a set below which a standard error is too poor a guess for an interval."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """A score and its 95 % interval."""

    metric: str
    value: float
    low: float | None
    """None, like `high`, where no interval would be honest."""
    high: float | None
    fake: Tensor
    """Influence of each generated sample [M], float64; up to a constant. [0] where none are drawn."""
    real: Tensor | None = None
    """Influence of each real one [N]; None where there are none or the interval takes them as they are."""
    num_real: int | None = None
    """Real samples; None where the score is not computed from any."""
    note: str = ""
    """What a reader has to know."""

    @property
    def num_fake(self) -> int:
        """Generated samples."""
        return len(self.fake)

    @property
    def higher_is_better(self) -> bool:
        """Which way is better."""
        return metric(self.metric).higher_is_better

    def facts(self) -> dict[str, Any]:
        """What is written down of it: all but the influences."""
        return {
            "metric": self.metric,
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "num_fake": self.num_fake,
            "num_real": self.num_real,
            "higher_is_better": self.higher_is_better,
            "note": self.note,
        }


def estimate(
    metric: str, value: float, fake: Tensor, real: Tensor | None = None, num_real: int | None = None, note: str = ""
) -> Estimate:
    """A score with Student's interval, of as many degrees of freedom as Welch (1947) gives two sets."""
    sides = [side for side in (fake, real) if side is not None and (side is real or len(side))]
    number = num_real if real is None else len(real)
    if min(len(side) for side in sides) < FEWEST:
        return Estimate(metric, value, None, None, fake, real, number, note)
    variances = [float(side.var()) / len(side) for side in sides]
    spread = sum(variance**2 / (len(side) - 1) for variance, side in zip(variances, sides, strict=True))
    margin = student_t(sum(variances) ** 2 / spread) * math.sqrt(sum(variances)) if spread > 0 else 0.0
    return Estimate(metric, value, value - margin, value + margin, fake, real, number, note)


def estimate_share(
    metric: str, value: float, fake: Tensor, number: int, num_real: int | None = None, note: str = ""
) -> Estimate:
    """A share of `number` images with Wilson's interval for as many independent tries as have its variance.

    They are at most `number`, and as many where the influences are all alike, which says nothing of a variance.
    """
    if len(fake) < FEWEST:
        return Estimate(metric, value, None, None, fake, None, num_real, note)
    variance = _covariance(fake, fake) * (len(fake) - 1) / len(fake)  # so that samples themselves count as tries
    tries = value * (1 - value) / variance if variance > 0 else 0.0
    tries = min(tries, number) if tries > 0 else number
    low, high = wilson(value * tries, tries, NORMAL)
    return Estimate(metric, value, low, high, fake, None, num_real, note)


@dataclass(frozen=True)
class Difference:
    """A score of one model less that of another, and its 95 % interval."""

    metric: str
    value: float
    low: float | None
    """None, like `high`, where one of the two has no interval."""
    high: float | None

    @property
    def is_clear(self) -> bool:
        """Whether it is larger than chance explains: 0 is outside the interval."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    @property
    def better(self) -> int | None:
        """0 if the first model is better, 1 if the second is; None if it is not clear."""
        if not self.is_clear:
            return None
        return 0 if (self.value > 0) == metric(self.metric).higher_is_better else 1


def difference(first: Estimate, second: Estimate, *, paired: bool = True) -> Difference:
    """A score less another of the same metric.

    Real samples are the same for both, in the same order. The limits come from those of the two scores and from how
    their influences go together (Zou and Donner 2008, Statistics in Medicine 27): for means it is the paired t-test's
    interval, for shares Newcombe's (1998, Statistics in Medicine 17, p. 2635), which holds at 0 and 1 too.

    Args:
        first: One model's.
        second: The other's.
        paired: Sample i of both has the same prompt and seed; else the two sets are independent.

    Raises:
        UserError: the sets that have to go together differ in size.
        ValueError: the metrics are two.
    """
    if first.metric != second.metric:
        raise ValueError(f"{first.metric} less {second.metric}")
    if paired and first.num_fake != second.num_fake:
        raise UserError(f"{first.metric}: {first.num_fake} and {second.num_fake} samples; pairs need as many of both")
    if first.num_real != second.num_real:
        raise UserError(
            f"{first.metric}: {first.num_real} and {second.num_real} real samples; a comparison needs the same"
        )
    value = first.value - second.value
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return Difference(first.metric, value, None, None)
    common = _covariance(first.real, second.real) + (_covariance(first.fake, second.fake) if paired else 0.0)
    scale = math.sqrt(_variance(first) * _variance(second))
    correlation = max(-1.0, min(1.0, common / scale)) if scale > 0 else 0.0

    def margin(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 + other**2 - 2 * correlation * one * other))

    below = margin(first.value - first.low, second.high - second.value)
    above = margin(first.high - first.value, second.value - second.low)
    return Difference(first.metric, value, value - below, value + above)


def _variance(score: Estimate) -> float:
    return _covariance(score.fake, score.fake) + _covariance(score.real, score.real)


def _covariance(first: Tensor | None, second: Tensor | None) -> float:
    # Of the means of two sets of influences.
    if first is None or second is None or not len(first):
        return 0.0
    return float(torch.cov(torch.stack((first, second)))[0, 1]) / len(first)
