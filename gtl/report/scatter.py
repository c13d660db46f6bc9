"""Trials as dots, as lines across axes and as intervals, as plain geometry: the template draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gtl.report.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Tick
from gtl.report.scale import Scale

WIDE = 740
"""Of the drawing with those axes, where there is room."""
SIDE = 20
"""Margin beside the axes."""
ABSENT = 30
"""Room on the left of such an axis for trials that have no value on it."""
ASIDE = 9
"""Dots of the same listed value stand so far from each other, if there is room."""
BAR = 26
"""Height of an interval's row."""


@dataclass(frozen=True)
class Entry:
    """How a trial is shown in all drawings."""

    number: int
    """Its row in the page's table, from 1."""
    kind: str
    """A class of the style: what came of it."""
    text: str
    """The trial in words."""


@dataclass(frozen=True)
class Spot:
    """A trial as a dot."""

    entry: Entry
    x: float
    y: float
    is_cross: bool = False
    """It failed."""
    side: tuple[int, int] = (0, 0)
    """Which way its value lies beyond the drawing, across and down; it is at the edge then."""

    @property
    def arrow(self) -> str:
        """Points of a triangle that looks the way the value lies; empty: the dot is where it should be."""
        (across, down), (x, y) = self.side, (self.x, self.y)
        if (across, down) == (0, 0):
            return ""
        back = (x - 3 * across, y - 3 * down)
        ends = [(back[0] + turn * 5 * down, back[1] - turn * 5 * across) for turn in (-1, 1)]
        return " ".join(f"{a:g},{b:g}" for a, b in [(x + 6 * across, y + 6 * down), *ends])


@dataclass(frozen=True)
class Scatter:
    """A drawing of dots."""

    title: str
    across: str
    """What the axis below is of."""
    note: str
    """What is special of the axes."""
    description: str
    """The drawing in words, for those who do not see it."""
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    spots: list[Spot]
    front: str = ""
    """Points of a line through the best trade-offs."""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def draw_scatter(
    title: str, across: Scale, up: Scale, spots: Sequence[Spot], note: str = "", front: str = ""
) -> Scatter:
    """Dots over a scale from left to right and one from bottom to top.

    Args:
        title: Of the drawing.
        across: From left to right.
        up: From bottom to top.
        spots: What is drawn last lies on top.
        note: Said beside the title.
        front: Points of a line.
    """
    log = [name for scale, name in ((up, "up"), (across, "across")) if scale.is_log]
    notes = [*([note] if note else []), *([f"logarithmic {' and '.join(log)}"] if log else [])]
    notes += [f"triangles: {scale.beyond}" for scale in (up, across) if scale.far]
    crosses = sum(spot.is_cross for spot in spots)
    description = f"{up.key} against {across.key}: {len(spots)} trials" + (f", {crosses} failed" if crosses else "")
    return Scatter(
        title, across.key, "; ".join(notes), description, across.ticks, up.ticks, aside(spots, across.slot), front
    )


def aside(spots: Sequence[Spot], slot: float) -> list[Spot]:
    """Dots of the same listed value side by side, in the order of the table; others where they are."""
    if not slot:
        return list(spots)
    columns: dict[float, list[int]] = {}
    for spot in spots:
        columns.setdefault(spot.x, []).append(spot.entry.number)
    moved = []
    for spot in spots:
        members = sorted(columns[spot.x])
        position = members.index(spot.entry.number) - (len(members) - 1) / 2
        moved.append(replace(spot, x=round(spot.x + position * min(ASIDE, slot * 0.7 / len(members)), 1)))
    return moved


@dataclass(frozen=True)
class Row:
    """One of the axes that lie below each other."""

    title: str
    note: str
    at: float
    left: float
    ticks: list[Tick]
    absent: float | None
    """Where trials are that have no value on it."""


@dataclass(frozen=True)
class Thread:
    """A trial as a line from the first axis to the last."""

    entry: Entry
    points: str


@dataclass(frozen=True)
class Parallel:
    """A drawing of parallel coordinates; from top to bottom, so that it has room for names on a phone."""

    description: str
    rows: list[Row]
    threads: list[Thread]
    height: int
    width: int

    @property
    def right(self) -> int:
        """Where the axes end."""
        return self.width - SIDE


def span(has_absent: bool, width: int) -> tuple[float, float, float | None]:
    """Where an axis of these starts, where it ends, and where trials without a value are."""
    return (SIDE + ABSENT, width - SIDE, SIDE) if has_absent else (SIDE, width - SIDE, None)


def draw_parallel(
    description: str, scales: Sequence[Scale], notes: Sequence[str], entries: Sequence[Entry],
    places: Sequence[Sequence[float]], width: int, row: int,
) -> Parallel:  # fmt: skip
    """Lines across axes.

    Args:
        description: Of the drawing, in words.
        scales: From left to right each, in the order from top to bottom.
        notes: Said beside each axis' name.
        entries: The trials; what is drawn last lies on top.
        places: [trial][axis] -> where its value is.
        width: Of the drawing.
        row: Height from one axis to the next.
    """
    ats = [30 + i * row for i in range(len(scales))]
    rows = [
        Row(scale.key, note, at, span(scale.absent is not None, width)[0], scale.ticks, scale.absent)
        for scale, note, at in zip(scales, notes, ats, strict=True)
    ]
    threads = [
        Thread(entry, " ".join(f"{x:g},{y:g}" for x, y in zip(xs, ats, strict=True)))
        for entry, xs in zip(entries, places, strict=True)
    ]
    return Parallel(description, rows, threads, ats[-1] + 24, width)


@dataclass(frozen=True)
class Bar:
    """What a trial was measured to be, and how sure that is."""

    entry: Entry
    label: str
    y: float
    low: float
    value: float
    high: float
    before: float | None
    """Where it was in the search."""


@dataclass(frozen=True)
class Bars:
    """A drawing of intervals below each other."""

    description: str
    ticks: list[Tick]
    bars: list[Bar]
    height: int
    width: int = WIDTH
    left: int = LEFT
    right: int = WIDTH - RIGHT

    @property
    def bottom(self) -> int:
        """Where the axis is."""
        return self.height - BOTTOM + 8
