"""Line charts as plain geometry: where the ticks, lines and dots of an SVG go. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

WIDTH, HEIGHT = 360, 216
"""Of the drawing, in its own units; near CSS pixels on a phone, so that text keeps its size."""
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 10, 32
"""Margins around the area with the lines."""
MAX_POINTS = 2000
"""Of a line. Of more, each stretch keeps its lowest and its highest."""
MAX_DOTS = 30
"""A line with more points, or in the background, has no dots on them."""
LOG_RATIO = 20
"""Of the highest value to the lowest, from which on a logarithmic axis shows more."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """What one line shows."""

    label: str
    points: Sequence[Point]
    """(step, value) by step; a value that is not finite leaves a gap."""
    colour: int = 0
    """Its place in the style's list of colours."""
    faint: bool = False
    """In the background, without a place in the legend."""
    bounds: Sequence[tuple[float, float, float]] = ()
    """(step, low, high): the intervals of values that have one."""
    kind: str = ""
    """Classes of the style that stand for what came of it, in place of a colour; without dots."""


@dataclass(frozen=True)
class Mark:
    """A step that is pointed at."""

    step: float
    text: str
    colour: int = 0
    kind: str = ""
    """As of a series."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Dot:
    """A point that tells its value."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Line:
    """A series in the drawing."""

    label: str
    colour: int
    faint: bool
    parts: list[str]
    """Points of each polyline; a gap begins a new one."""
    dots: list[Dot]
    bounds: list[tuple[float, float, float]]
    """Where the intervals are: across, lower and upper end."""
    kind: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawing of WIDTH x HEIGHT."""

    title: str
    unit: str
    log: bool
    description: str
    """The chart in words, for those who do not see it."""
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    marks: list[Mark]
    """At their places instead of their steps."""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM

    @property
    def legend(self) -> list[Line]:
        """The lines that have to be told apart."""
        shown = [line for line in self.lines if not line.faint]
        return shown if len(shown) > 1 else []


@dataclass(frozen=True)
class Axis:
    """Values -> places."""

    low: float
    high: float
    start: float
    """Where `low` is."""
    end: float
    """Where `high` is."""
    log: bool = False
    clips: bool = False
    """What lies beyond is at the end."""

    def place(self, value: float) -> float:
        """Where a value is, to a tenth of a unit."""
        value = min(max(value, self.low), self.high) if self.clips else value
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)


def draw(
    title: str, series: Sequence[Series], *, unit: str = "", log: bool = False, zero: bool = False,
    marks: Sequence[Mark] = (), within: tuple[float, float] | None = None,
) -> Chart | None:  # fmt: skip
    """A chart of series over steps; None when no value is finite.

    Args:
        title: What the values are.
        series: The lines.
        unit: Of the values.
        log: May have a logarithmic axis; it does if the values differ enough for it.
        zero: The axis starts at zero.
        marks: Steps to point at; those beyond the series are left out.
        within: Lowest and highest value that the axis has room for; what lies beyond is at its end. None: all.
    """
    finite = [point for one in series for point in one.points if math.isfinite(point[1])]
    if not finite:
        return None
    steps, values = [step for step, _ in finite], [value for _, value in finite]
    values += [bound for one in series for _, low, high in one.bounds for bound in (low, high)]
    first, last = min(steps), max(steps)
    x = Axis(first, last, LEFT, WIDTH - RIGHT) if last > first else Axis(first - 1, first + 1, LEFT, WIDTH - RIGHT)
    marked = [at for at in linear_ticks(first, last, 5) if at == int(at)] if last > first else [first]
    low, high = within or (min(values), max(values))
    y = replace(vertical(low, high, log, zero), clips=within is not None)
    return Chart(
        title, unit, y.log, "; ".join(describe(one) for one in series if not one.faint),
        [Tick(x.place(at), short(at)) for at in marked],
        [Tick(y.place(at), short(at)) for at in (log_ticks if y.log else linear_ticks)(y.low, y.high)],
        [trace(one, x, y, unit) for one in series],
        [replace(mark, step=x.place(mark.step)) for mark in marks if x.low <= mark.step <= x.high],
    )  # fmt: skip


def vertical(low: float, high: float, log: bool, zero: bool) -> Axis:
    """The axis of values: a little wider than they are."""
    if log and low > 0 and high / low >= LOG_RATIO:
        return Axis(low / 1.2, high * 1.2, HEIGHT - BOTTOM, TOP, True)
    if zero and low >= 0:
        return Axis(0.0, high * 1.05 or 1.0, HEIGHT - BOTTOM, TOP)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Axis(low - margin, high + margin, HEIGHT - BOTTOM, TOP)


def trace(series: Series, x: Axis, y: Axis, unit: str) -> Line:
    """The polylines and dots of a series."""
    parts = [thin(part) for part in unbroken(series.points)]
    is_dotted = len(series.points) <= MAX_DOTS and not series.faint and not series.kind
    dots = []
    for part in parts:
        if is_dotted or len(part) == 1:  # which as a line would not be seen
            texts = (f"{series.label}, step {step:g}: {short(value)} {unit}".rstrip() for step, value in part)
            dots += [Dot(x.place(step), y.place(v), text) for (step, v), text in zip(part, texts, strict=True)]
    lines = [" ".join(f"{x.place(step):g},{y.place(value):g}" for step, value in part) for part in parts]
    bounds = [(x.place(step), y.place(low), y.place(high)) for step, low, high in series.bounds]
    return Line(series.label, series.colour, series.faint, lines, dots, bounds, series.kind)


def unbroken(points: Sequence[Point]) -> Iterator[list[Point]]:
    """The stretches between values that are not finite."""
    part: list[Point] = []
    for point in points:
        if math.isfinite(point[1]):
            part.append(point)
        elif part:
            yield part
            part = []
    if part:
        yield part


def thin(points: list[Point]) -> list[Point]:
    """At most MAX_POINTS of them, among which every dip and peak that can be seen."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """The mean of each finite value and those before it, up to `window` of them."""
    finite = [point for point in points if math.isfinite(point[1])]
    means = []
    for i, (step, _) in enumerate(finite):
        values = [value for _, value in finite[max(0, i + 1 - window) : i + 1]]
        means.append((step, sum(values) / len(values)))
    return means


def describe(series: Series) -> str:
    """A series in words."""
    points = [point for point in series.points if math.isfinite(point[1])]
    if not points:
        return f"{series.label}: no values"
    (first, start), (last, end) = points[0], points[-1]
    step, low = min(points, key=lambda point: point[1])
    return (
        f"{series.label}: from {short(start)} at step {first:g} to {short(end)} at step {last:g}, "
        f"lowest {short(low)} at step {step:g}"
    )


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About so many round values in a range."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in a range, with 2 and 5 times them where it is short; every other or so where it is long."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) <= 2.5 else (1,)
    stride = max(1, round(len(exponents) / 5)) if len(factors) == 1 else 1
    ticks = [factor * 10.0**exponent for exponent in exponents[::stride] for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


def short(value: float) -> str:
    """A number in few characters: 0.0125, 250, 12.5k, 1e-5."""
    if abs(value) >= 1e4:
        for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.4g}{letter}"
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa
