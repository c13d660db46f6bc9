"""A study's schedule without its training: trials whose curves are known go through a scheduler, event by event."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

Curve = Sequence[tuple[int, float]]
"""(step, metric) of a trial's looks, in their order."""


@dataclass(frozen=True)
class Outcome:
    """What came of one order."""

    chosen: str
    """The best of the trials that ran to their end."""
    spent: int
    """Steps of all trials."""
    ended: float = field(default=0.0, compare=False)
    """When the last trial ended; the first ones begin at 0."""
    busy: float = field(default=0.0, compare=False)
    """Time of all trials together."""


def replay(
    scheduler: Any, curves: Mapping[str, Curve], order: Sequence[str], concurrency: int, keys: tuple[str, str],
    mode: str, paces: Mapping[str, float], start: float = 0.0, look: float = 0.0,
) -> Outcome:  # fmt: skip
    """Let a scheduler see recorded looks as if the trials ran now, each as fast as it was.

    Of trials that are all equally fast the order in which they begin is that in which they come to every rung, however
    many there are at once.

    Args:
        scheduler: Ray Tune's, new.
        curves: Trial -> its whole curve.
        order: In which trials begin.
        concurrency: Trials at once; the next begins when one ends.
        keys: Names of the step and of the metric in what trials report.
        mode: max or min.
        paces: Trial -> time of a step, in any unit; 1 where it is not known.
        start: Time before a trial's first step.
        look: Time of a look.
    """
    waiting = list(reversed(order))
    looks: list[tuple[float, int, str, int]] = []
    """A queue of (time, begun as the how many-th, trial, number of the look)."""
    trials: dict[str, Any] = {}
    begun: dict[str, float] = {}
    spent, busy, now, whole = 0, 0.0, 0.0, []

    def begin(now: float) -> None:
        name = waiting.pop()
        trials[name] = SimpleNamespace(trial_id=name)
        scheduler.on_trial_add(None, trials[name])
        begun[name] = now
        first = start + curves[name][0][0] * paces.get(name, 1.0) + look
        heapq.heappush(looks, (now + first, len(trials), name, 0))

    for _ in range(min(concurrency, len(waiting))):
        begin(0)
    while looks:
        now, number, name, at = heapq.heappop(looks)
        step, value = curves[name][at]
        report = dict(zip(keys, (step, value), strict=True))
        is_last = at + 1 == len(curves[name])
        if is_last:  # of which Ray Tune does not ask the scheduler
            scheduler.on_trial_complete(None, trials[name], report)
            whole.append(name)
        elif scheduler.on_trial_result(None, trials[name], report) != scheduler.STOP:
            took = (curves[name][at + 1][0] - step) * paces.get(name, 1.0)
            heapq.heappush(looks, (now + took + look, number, name, at + 1))
            continue
        spent, busy = spent + step, busy + now - begun[name]
        if waiting:
            begin(now)
    return Outcome(min(whole, key=lambda name: cost(curves[name], mode)), spent, now, busy)


def cost(curve: Curve, mode: str) -> float:
    """The best of a curve, as something that should be low."""
    sign = 1 if mode == "min" else -1
    return min(sign * value for _, value in curve if math.isfinite(value))
