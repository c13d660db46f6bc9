"""What a study would take of a cluster: its trials put through its own scheduler, with times instead of training.

How good a trial is has to be assumed, since nobody has seen a curve yet: all keep their place among each other from the
first look to the last, and come in random order. Of trials whose curves cross, others are stopped, and about as many;
`gtl bench stopping` replays curves that were recorded. HyperBand's trials wait for each other and a population's take
over each other's weights: theirs are all counted whole.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from gtl.config import Study
from gtl.config.search import Asha, Fifo
from gtl.config.trials import longest
from gtl.search.replay import Curve, Outcome, replay
from gtl.search.schedule import STEP, make_scheduler
from gtl.search.space import configurations

MOST_DRAWS = 20
"""Orders of the trials that are gone through."""
ENOUGH = 1000
"""Trials of all of them together: as much as takes a second."""


@dataclass(frozen=True)
class Tempo:
    """Seconds of a trial's parts."""

    step: float
    look: float
    start: float
    """Before the first step."""


@dataclass(frozen=True)
class Schedule:
    """What all trials of a study take, in one order of them."""

    seconds: float
    """On the clock."""
    busy: float
    """Seconds of all trials together."""
    share: float
    """Of the steps that whole trials would make."""


def simulate(study: Study, tempo: Tempo, places: int, seed: int = 0) -> Schedule:
    """Go through a study's trials in one order; rates that are carried to other ranks come behind them.

    Args:
        study: Whose recipe says steps, not epochs.
        tempo: Of its trials.
        places: Trials at once.
        seed: Of the order, which is that of how good they are.
    """
    lengths = lengths_of(study)
    searched = study.at_smallest_rank.num_trials
    scheduled = study if isinstance(study.scheduler, Asha | Fifo) else fifo(study)
    first = go_through(scheduled, lengths[:searched], tempo, places, seed)
    parts = [first]
    if lengths[searched:]:
        parts.append(go_through(fifo(study), lengths[searched:], tempo, places, seed))
    return Schedule(
        sum(part.ended for part in parts), sum(part.busy for part in parts),
        sum(part.spent for part in parts) / sum(lengths),
    )  # fmt: skip


def draws(study: Study, tempo: Tempo, places: int) -> list[Schedule]:
    """In several orders, shortest first; of a study that stops nobody in one."""
    number = min(MOST_DRAWS, max(1, ENOUGH // study.num_trials)) if study.scheduler.type == "asha" else 1
    return sorted((simulate(study, tempo, places, seed) for seed in range(number)), key=lambda one: one.seconds)


def middle(found: Sequence[Schedule]) -> Schedule:
    """The median of every number by itself."""
    return Schedule(
        median(one.seconds for one in found), median(one.busy for one in found), median(one.share for one in found)
    )


def lengths_of(study: Study) -> list[int]:
    """Steps of every trial; of those that a searcher has not chosen yet, of the longest.

    Raises:
        ValueError: the recipe says epochs.
    """
    most = longest(study)
    if most is None:
        raise ValueError("steps: the recipe says epochs")
    if "train.steps" not in study.space or study.searcher.type not in ("random", "grid"):
        return [most] * study.num_trials
    known = [int(values.get("train.steps", study.base.train.steps or most)) for values in configurations(study)]
    return known + [most] * (study.num_trials - len(known))


def fifo(study: Study) -> Study:
    """The study without a scheduler."""
    return study.model_copy(update={"scheduler": Fifo()})


def go_through(study: Study, lengths: Sequence[int], tempo: Tempo, places: int, seed: int) -> Outcome:
    """Trials of so many steps each under a study's scheduler."""
    every = study.base.evaluate.every
    worth = [float(value) for value in random.Random(seed).sample(range(len(lengths)), len(lengths))]
    names = [str(number) for number in range(len(lengths))]
    curves = {name: flat(steps, value, every) for name, steps, value in zip(names, lengths, worth, strict=True)}
    scheduler: Any = make_scheduler(study, longest(study))
    metric, mode = next(iter(study.directions.items()))
    paces = dict.fromkeys(names, tempo.step)
    return replay(scheduler, curves, names, places, (STEP, metric), mode, paces, tempo.start, tempo.look)


def flat(steps: int, value: float, every: int) -> Curve:
    """A trial that is at every look what it is at the last."""
    return [(step, value) for step in [*range(every, steps, every), steps]]
