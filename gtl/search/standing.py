"""How a study stands while it runs, as values for whoever shows them: who runs, who leads, how long it will take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from gtl.config import Study
from gtl.config.trials import longest
from gtl.search.record import ENDED, Record, TrialRecord
from gtl.types import Progress, quiet

STATES = ("running", "finished", "stopped", "failed", "waiting")


@dataclass(frozen=True)
class Contender:
    """A trial that runs, or the one that leads."""

    trial: str
    config: Mapping[str, Any]
    """Dotted keys of the recipe -> values; without those that do not apply."""
    step: int
    steps: int | None
    """Of a whole run; None where the recipe says epochs."""
    value: float | None
    """The study's first metric: of its newest look, or the leader's of its best; None before the first."""


@dataclass(frozen=True)
class Standing:
    """All of it."""

    metric: str
    """The study's first."""
    keys: tuple[str, ...]
    """Of the space."""
    running: tuple[Contender, ...]
    counts: Mapping[str, int]
    """State -> trials in it, of those that there are; who has not been listed yet waits too."""
    total: int
    """Trials at most."""
    best: Contender | None
    """So far, of all that were measured."""
    seconds_left: float | None
    """Until the last trial ends; None: not known yet."""

    @property
    def ended(self) -> int:
        """Trials that are through."""
        return sum(self.counts.get(state, 0) for state in ENDED)


Watch = Callable[[Standing], object]


@dataclass(frozen=True)
class Audience:
    """Whom a study tells how far it is."""

    progress: Progress
    watch: Watch | None
    """Takes how the trials stand, again and again."""
    hours: Callable[[], float]
    """On the clock since this part of the study began."""

    def __reduce__(self) -> tuple[type[Audience], tuple[Any, ...]]:
        """Nobody: Ray Tune writes down what it is given, and a terminal cannot be."""
        return Audience, (quiet, None, float)


@dataclass(frozen=True)
class Spent:
    """What this part of a search has taken so far."""

    steps: int
    """That all trials made since."""
    device_hours: float
    seconds: float
    """On the clock."""
    hours: float
    """Of the study on the clock, with its earlier parts."""


def standing(study: Study, record: Record, spent: Spent) -> Standing:
    """How the trials of a study stand.

    Args:
        study: Its file; where a rate is carried over ranks, of the part that runs.
        record: What is known of all trials.
        spent: So far.
    """
    trials = [one for _, one in sorted(record.trials.items())]
    total, metric = record.study.num_trials, study.metrics[0]
    states = [one.state for one in trials] + ["waiting"] * (total - len(trials))
    counts = {state: states.count(state) for state in STATES if state in states}
    running = tuple(
        Contender(one.trial, one.config, one.steps, steps_of(study, one), newest(one, metric))
        for one in trials
        if one.state == "running"
    )
    best = record.best()
    leader = None
    if best is not None:
        leader = Contender(best.trial, best.config, best.steps, steps_of(study, best), best.metrics[metric])
    left = seconds_left(study, record, counts.get("waiting", 0), spent)
    return Standing(metric, tuple(study.space), running, counts, total, leader, left)


def steps_of(study: Study, trial: TrialRecord) -> int | None:
    """Steps of a trial's whole run."""
    steps: int | None = trial.config.get("train.steps", study.base.train.steps)
    return steps


def newest(trial: TrialRecord, metric: str) -> float | None:
    """A metric of a trial's last look; costs are known at the end alone."""
    return trial.looks[-1].get(metric) if trial.looks else None


def seconds_left(study: Study, record: Record, waiting: int, spent: Spent) -> float | None:
    """At the pace of all trials together, and until a budget ends them."""
    limits = []
    if spent.steps > 0 and (left := steps_left(study, record, waiting)) is not None:
        limits.append(left * spent.seconds / spent.steps)
    if study.budget.hours is not None:
        limits.append((study.budget.hours - spent.hours) * 3600)
    if study.budget.gpu_hours is not None and spent.device_hours > 0:
        limits.append((study.budget.gpu_hours - record.device_hours) * spent.seconds / spent.device_hours)
    return max(0.0, min(limits)) if limits else None


def steps_left(study: Study, record: Record, waiting: int) -> float | None:
    """Steps that are still to be made, as far as those trials tell that are through; None where epochs are counted.

    Schedulers end some early: one that has come so far is expected to come as far as those of them that came farther.
    """
    whole, trials = longest(study), list(record.trials.values())
    if whole is None:
        return None
    ends = [one.steps / (steps_of(study, one) or whole) for one in trials if one.state in ENDED]
    left = waiting * whole * expected_end(0.0, ends)
    for one in trials:
        if one.state == "running":
            steps = steps_of(study, one) or whole
            left += steps * expected_end(one.steps / steps, ends) - one.steps
    return left


def expected_end(come: float, ends: Sequence[float]) -> float:
    """Where one that has come so far will end, of 1; 1 where none that is through came farther."""
    farther = [end for end in ends if end > come]
    return fmean(farther) if farther else 1.0
