"""Where the values of a recipe's key, or of a metric, are on an axis: listed values side by side, ranges as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import quantiles
from typing import Any

from gtl.config.space import Domain, label
from gtl.report.chart import LOG_RATIO, Axis, Tick, linear_ticks, log_ticks, short

CHARACTER = 6.2
"""Width of one in a label, about, in units of a drawing."""
FENCE = 3
"""Interquartile ranges beyond the quartiles, from which on a value is far out (Tukey 1977)."""
FEWEST = 8
"""Values from which on quartiles say what is usual."""


@dataclass(frozen=True)
class Scale:
    """Values -> places."""

    key: str
    ticks: list[Tick]
    axis: Axis | None
    """Of numbers; None of listed values."""
    places: Mapping[str, float]
    """Of listed values, in their order."""
    slot: float
    """Width of a listed value's place; 0 of numbers."""
    absent: float | None
    """Where those are that have no value."""
    far: Sequence[float] = ()
    """Values that lie beyond the axis, and are drawn at its end."""

    @property
    def is_log(self) -> bool:
        """Whether distances stand for ratios."""
        return self.axis is not None and self.axis.log

    def place(self, value: Any) -> float:
        """Where a value is, or MISSING."""
        if value is MISSING:
            assert self.absent is not None
            return self.absent
        return self.places[label(value)] if self.axis is None else self.axis.place(value)

    def side(self, value: Any) -> int:
        """Beyond which end of the axis a value lies: -1 the one with small places, 1 the other, 0 neither."""
        if value not in self.far or self.axis is None:
            return 0
        return 1 if (value > self.axis.high) == (self.axis.end > self.axis.start) else -1

    @property
    def beyond(self) -> str:
        """What is said of the values beyond the axis; empty: there are none."""
        return beyond_in_words(self.far)


MISSING = object()
"""In place of a value: of a trial to which a key does not apply, or that was not measured."""


def scale_of(
    key: str, domain: Domain, values: Sequence[Any], start: float, end: float, absent: float | None = None
) -> Scale:
    """The axis of a key of the space.

    Args:
        key: Dotted key of the recipe.
        domain: How it is drawn.
        values: What trials have, those that have the key.
        start: Where the axis begins, in units of the drawing.
        end: Where it ends.
        absent: Where trials are that lack the key.
    """
    if domain.bounds is not None:
        low, high = min([*values, domain.bounds[0]]), max([*values, domain.bounds[1]])
        return numbers(key, low, high, domain.is_log, start, end, absent)
    labels = list(dict.fromkeys(map(label, [*domain.values, *values])))
    slot = (end - start) / len(labels)
    shown = brief(labels, max(3, int(abs(slot) / CHARACTER) - 1))
    ticks = [Tick(round(start + (i + 0.5) * slot, 1), text) for i, text in enumerate(shown)]
    places = {text: tick.at for text, tick in zip(labels, ticks, strict=True)}
    return Scale(key, apart(ticks), None, places, abs(slot), absent)


def brief(labels: Sequence[str], most: int) -> list[str]:
    """Labels with so many characters, cut where they can be told apart so; else, as all numbers are, whole.

    Those that then have no room are left out: see `apart`.
    """
    for end in (False, True):
        cut = [text if len(text) <= most else shorten(text, most, end) for text in labels]
        if len(set(cut)) == len(labels) and not any(map(is_number, labels)):
            return cut
    return list(labels)


def shorten(text: str, most: int, end: bool) -> str:
    """The beginning of a text, or its end."""
    return f"…{text[1 - most :]}" if end else f"{text[: most - 1]}…"


def is_number(text: str) -> bool:
    """Whether a label is one, of which a part is another."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def scale_of_metric(
    name: str, values: Sequence[float], log: bool, start: float, end: float, absent: float | None = None,
    direction: str = "",
) -> Scale:  # fmt: skip
    """The axis of a metric, a little wider than its values; `log` allows a logarithmic one.

    With a direction, min or max, a linear axis ends on its worse side behind the last value that is not far out: beside
    those of trials that diverged all others would be one line.
    """
    low, high = min(values), max(values)
    if log and low > 0 and high / low >= LOG_RATIO:
        return numbers(name, low / 1.15, high * 1.15, True, start, end, absent)
    near = usual(values, direction)
    low, high = min(near), max(near)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    scale = numbers(name, low - margin, high + margin, False, start, end, absent)
    return replace(scale, far=[value for value in values if not low - margin <= value <= high + margin])


def usual(values: Sequence[float], direction: str) -> Sequence[float]:
    """Those that are not far out on the worse side; all where quartiles do not tell."""
    if len(values) < FEWEST or not direction:
        return values
    first, _, third = quantiles(values, method="inclusive")
    reach = FENCE * (third - first)
    if reach == 0:
        return values
    return [value for value in values if (value <= third + reach if direction == "min" else value >= first - reach)]


def beyond_in_words(far: Sequence[float]) -> str:
    """How many values lie beyond an axis, and how far they go; empty: none do."""
    if not far:
        return ""
    low, high = short(min(far)), short(max(far))
    return f"{len(far)} beyond the end ({low if low == high else f'{low} to {high}'})"


def numbers(key: str, low: float, high: float, log: bool, start: float, end: float, absent: float | None) -> Scale:
    """An axis of numbers with its ticks."""
    axis = Axis(low, high, start, end, log, clips=True)
    ats = log_ticks(low, high) if log else linear_ticks(low, high)
    if len(ats) < 2:  # a range inside a decade
        ats = linear_ticks(low, high)
    return Scale(key, apart([Tick(axis.place(at), short(at)) for at in ats]), axis, {}, 0.0, absent)


def apart(ticks: Sequence[Tick]) -> list[Tick]:
    """Those whose labels do not lie over one before."""
    kept: list[Tick] = []
    for tick in ticks:
        if not kept or abs(tick.at - kept[-1].at) >= (len(tick.text) + len(kept[-1].text)) * CHARACTER / 2 + 6:
            kept.append(tick)
    return kept
