"""Which drawings a study makes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gtl.config.judged import COSTS
from gtl.config.space import label
from gtl.report.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Mark, Series, draw, short
from gtl.report.curves import metric_of
from gtl.report.ranking import Outcome, front
from gtl.report.scale import MISSING, beyond_in_words, scale_of, scale_of_metric, usual
from gtl.report.scatter import BAR, Bar, Bars, Entry, Parallel, Scatter, Spot, draw_parallel, draw_scatter, span
from gtl.report.study import Study, Trial, by_metrics, leader, standing

LEVELS = 5
"""Colours from the best to the worst that ran to its end: r0, r1 and so on in the style."""
LOST = 12
"""Height of a strip for trials that have no value, in a drawing of dots."""


@dataclass(frozen=True)
class Board:
    """A study's trials in the order of the page."""

    study: Study
    order: list[Trial]
    lead: Trial | None
    """The winner, or the best so far."""
    entries: dict[str, Entry]

    @property
    def backwards(self) -> list[Trial]:
        """From the worst to the best, the leader last: what is drawn last lies on top."""
        return sorted(reversed(self.order), key=lambda one: one == self.lead)

    def entry(self, trial: Trial) -> Entry:
        """How a trial is shown."""
        return self.entries[trial.trial]


def make_board(study: Study) -> Board:
    """A study's trials, each with its place and its colour."""
    order, lead = standing(study), leader(study)
    again, places = [one.trial for one in study.finalists], by_metrics(study)
    ranked = sorted(
        (one for one in order if one.state in ("finished", "running") and one.trial in places),
        key=lambda one: (again.index(one.trial) if one.trial in again else len(again), places[one.trial]),
    )
    levels = {one.trial: f"r{i * LEVELS // len(ranked)}" for i, one in enumerate(ranked)}
    kinds = {one.trial: levels.get(one.trial, "failed" if one.state == "failed" else "stopped") for one in order}
    if lead is not None:
        kinds[lead.trial] = "lead"
    entries = {one.trial: Entry(i, kinds[one.trial], in_words(one, study)) for i, one in enumerate(order, 1)}
    return Board(study, order, lead, entries)


def in_words(trial: Trial, study: Study) -> str:
    """A trial in one line."""
    values = ", ".join(f"{name_of(key, study)} {value_text(value)}" for key, value in trial.config.items())
    numbers = ", ".join(f"{name} {short(value)}" for name, value in trial.metrics.items())
    ended = f"{trial.state} after {trial.steps} steps"
    return "; ".join(part for part in (f"{trial.trial}: {values}", numbers, ended) if part)


def name_of(key: str, study: Study) -> str:
    """The last part of a key of the space, or all of it where two end alike."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in study.space) == 1 else key


def value_text(value: object) -> str:
    """A value of a key for people."""
    return short(value) if type(value) in (int, float) else label(value)  # type: ignore[arg-type]


def may_be_log(metric: str) -> bool:
    """Whether ratios of a metric say more than differences."""
    return metric in COSTS or metric_of(metric).log


def better(study: Study, metric: str) -> str:
    """Which way is better, in words."""
    return "higher is better" if study.directions[metric] == "max" else "lower is better"


def parallel(board: Board, width: int, row: int) -> Parallel:
    """All trials across the keys and the metrics, the better end of a metric on the right.

    Args:
        board: The trials, at least one.
        width: Of the drawing.
        row: Height from one axis to the next.
    """
    study, trials = board.study, board.backwards
    scales, notes, columns = [], [], []
    for key, domain in study.space.items():
        values = [one.config.get(key, MISSING) for one in trials]
        given = [value for value in values if value is not MISSING]
        start, end, absent = span(len(given) < len(values), width)
        scales.append(scale_of(key, domain, given, start, end, absent))
        notes.append("logarithmic" if scales[-1].is_log else "")
        columns.append(values)
    for name, direction in study.directions.items():
        values = [one.metrics.get(name, MISSING) for one in trials]
        given = [value for value in values if value is not MISSING]
        if not given:
            continue
        start, end, absent = span(len(given) < len(values), width)
        ends = (start, end) if direction == "max" else (end, start)
        scales.append(scale_of_metric(name, given, may_be_log(name), *ends, absent, direction))
        said = ("better on the right", "logarithmic" if scales[-1].is_log else "", scales[-1].beyond)
        notes.append(", ".join(part for part in said if part))
        columns.append(values)
    places = [
        [scale.place(value) for scale, value in zip(scales, values, strict=True)]
        for values in zip(*columns, strict=True)
    ]
    words = f"{len(trials)} trials across {', '.join(scale.key for scale in scales)}; the table has their values"
    return draw_parallel(words, scales, notes, [board.entry(one) for one in trials], places, width, row)


def by_key(board: Board, key: str, metric: str) -> Scatter | None:
    """A metric against a key of the space; None if no trial has both."""
    study = board.study
    trials = [one for one in board.backwards if key in one.config]
    measured = [one for one in trials if metric in one.metrics]
    lost = [one for one in trials if metric not in one.metrics and one.state == "failed" and metric not in COSTS]
    if not measured:
        return None
    across = scale_of(
        key, study.space[key], [one.config[key] for one in [*measured, *lost]], LEFT + 8, WIDTH - RIGHT - 8
    )
    floor = HEIGHT - BOTTOM - (LOST if lost else 0)
    values = [one.metrics[metric] for one in measured]
    up = scale_of_metric(metric, values, may_be_log(metric), floor, TOP, direction=study.directions[metric])
    spots = [Spot(board.entry(one), across.place(one.config[key]), HEIGHT - BOTTOM - LOST / 2, True) for one in lost]
    for one in measured:
        x, value = across.place(one.config[key]), one.metrics[metric]
        spots.append(Spot(board.entry(one), x, up.place(value), one.state == "failed", (0, up.side(value))))
    return draw_scatter(f"{metric} by {name_of(key, study)}", across, up, spots, better(study, metric))


def trade_offs(board: Board) -> list[Scatter]:
    """Each two of the metrics against each other, and a line through the Pareto front where there are two."""
    study, drawn = board.study, []
    whole = [one for one in board.backwards if set(study.directions) <= set(one.metrics)]
    ended = [Outcome(one.trial, one.metrics) for one in whole if one.state == "finished"]
    ahead = {outcome.trial for outcome in front(ended, study.directions)}
    for up_name, across_name in itertools.combinations(study.directions, 2) if whole else ():
        across, up = (
            scale_of_metric(
                name, [one.metrics[name] for one in whole], may_be_log(name), *ends, direction=study.directions[name]
            )
            for name, ends in ((across_name, (LEFT + 8, WIDTH - RIGHT - 8)), (up_name, (HEIGHT - BOTTOM, TOP)))
        )
        pairs = [(one, one.metrics[across_name], one.metrics[up_name]) for one in whole]
        spots = [
            Spot(board.entry(one), across.place(x), up.place(y), side=(across.side(x), up.side(y)))
            for one, x, y in pairs
        ]
        ends = sorted((spot.x, spot.y) for spot, one in zip(spots, whole, strict=True) if one.trial in ahead)
        line = " ".join(f"{x:g},{y:g}" for x, y in ends) if len(study.directions) == 2 else ""
        note = f"up: {better(study, up_name)}; across: {better(study, across_name)}"
        drawn.append(draw_scatter(f"{up_name} and {across_name}", across, up, spots, note, line))
    return drawn


def curves(board: Board) -> list[Chart]:
    """What each look measured, a line for each trial."""
    study, drawn = board.study, []
    looked = {name for one in board.order for look in one.looks for name in look}
    for name in [*study.directions, *sorted(looked - {*study.directions, "step"})]:
        series = [
            Series(one.trial, one.series(name), kind=f"{board.entry(one).kind} n{board.entry(one).number}")
            for one in board.backwards if one.series(name)
        ]  # fmt: skip
        marks = []
        if (lead := board.lead) is not None and lead.best_step is not None:
            marks = [Mark(lead.best_step, f"step {lead.best_step}, the best look of {lead.trial}", kind="lead")]
        metric = metric_of(name)
        far, within = apart_from(series, study.directions.get(name, ""))
        chart = draw(name, series, unit=metric.unit, log=metric.log, marks=marks, within=within)
        notes = [
            *([metric.unit] if metric.unit else []),
            *([f"at the edge: {beyond_in_words(far)}"] if far else []),
        ]
        drawn += [replace(chart, unit="; ".join(notes))] if chart is not None else []
    return drawn


def apart_from(series: Sequence[Series], direction: str) -> tuple[list[float], tuple[float, float] | None]:
    """Last values of the lines that ended far out, and lowest and highest of all the others; None: none did."""
    curves = [[value for _, value in one.points if math.isfinite(value)] for one in series]
    curves = [curve for curve in curves if curve]
    near = set(usual([curve[-1] for curve in curves], direction))
    far = [curve[-1] for curve in curves if curve[-1] not in near]
    others = [value for curve in curves if curve[-1] in near for value in curve]
    return far, (min(others), max(others)) if far else None


def finalists(board: Board) -> Bars | None:
    """The intervals of those that were measured again; None if none was."""
    found = [one for one in board.study.finalists if one.trial in board.entries]
    if not found:
        return None
    trials = {one.trial: one for one in board.order}
    before = [trials[one.trial].metrics.get(one.metric) for one in found]
    ends = [end for one in found for end in (one.low, one.value, one.high) if end is not None]
    scale = scale_of_metric(found[0].metric, [*ends, *(v for v in before if v is not None)], False, LEFT, WIDTH - RIGHT)
    bars = []
    for i, (one, earlier) in enumerate(zip(found, before, strict=True)):
        low, value, high = (scale.place(one.value if end is None else end) for end in (one.low, one.value, one.high))
        ring = None if earlier is None else scale.place(earlier)
        bars.append(Bar(board.entries[one.trial], one.trial, 16 + i * BAR, low, value, high, ring))
    words = "; ".join(f"{one.trial}: {interval_text(one.value, one.low, one.high)}" for one in found)
    return Bars(words, scale.ticks, bars, len(bars) * BAR + BOTTOM)


def interval_text(value: float, low: float | None, high: float | None) -> str:
    """A number with its interval."""
    return short(value) if low is None or high is None else f"{short(value)} ({short(low)} to {short(high)})"
