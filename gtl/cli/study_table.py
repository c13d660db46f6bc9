"""What `gtl tune` shows in a terminal while trials run: who runs, who leads, how long it will take."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from gtl.cli.bar import Bar

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from rich.console import RenderableType

    from gtl.search.standing import Standing

AROUND = 6
"""Lines of a terminal that are not rows of trials."""


class StudyBar(Bar):
    """Progress on stderr; while trials run a table in a terminal, and the same lines as ever in a log."""

    def __init__(self) -> None:
        super().__init__()
        self._table: object | None = None

    def __call__(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Show that `done` of `total` of a phase is through; of the trials the table does."""
        if phase == "trials" and sys.stderr.isatty():
            return
        if self._table is not None:
            self.close()
        super().__call__(phase, done, total, detail)

    def watch(self, standing: Standing) -> None:
        """Show how the trials stand."""
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.live import Live

        if self._table is None:
            self.close()
            self._table = Live(console=Console(stderr=True), auto_refresh=False)
            self._table.start()
        assert isinstance(self._table, Live)
        self._table.update(render(standing, self._table.console.height - AROUND), refresh=True)

    def close(self) -> None:
        """Leave the last table, or the last bar, on the screen and let go of it."""
        super().close()
        if self._table is not None:
            self._table.stop()  # type: ignore[attr-defined]
            self._table = None


def render(standing: Standing, most: int) -> RenderableType:
    """The counts, the best so far, and a row for each trial that runs, `most` at most."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    lines: list[RenderableType] = [Text(counts(standing))]
    if (best := standing.best) is not None and best.value is not None:
        lines.append(Text(f"best   {best.trial}: {standing.metric} {number(best.value)}  {values_of(best.config)}"))
    if standing.running:
        rows = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("trial", *names(standing.keys), "step", standing.metric):
            rows.add_column(name, no_wrap=True)
        shown = standing.running[: max(1, most)]
        for one in shown:
            step = str(one.step) if one.steps is None else f"{one.step}/{one.steps}"
            keys = [number(one.config[key]) if key in one.config else "" for key in standing.keys]
            rows.add_row(*map(Text, (one.trial, *keys, step, "" if one.value is None else number(one.value))))
        lines.append(rows)
        if len(shown) < len(standing.running):
            lines.append(Text(f"and {len(standing.running) - len(shown)} more that run"))
    return Group(*lines)


def counts(standing: Standing) -> str:
    """How many trials are in which state, and how long all of them will take."""
    from gtl.report.facts import duration

    states = ", ".join(f"{count} {state}" for state, count in standing.counts.items())
    left = standing.seconds_left
    return f"trials {standing.ended}/{standing.total}: {states}" + (f"; {duration(left)} left" if left else "")


def names(keys: tuple[str, ...]) -> list[str]:
    """The last words of dotted keys, where these tell them apart."""
    last = [key.rpartition(".")[2] for key in keys]
    return [key if last.count(name) > 1 else name for key, name in zip(keys, last, strict=True)]


def values_of(config: Mapping[str, Any]) -> str:
    """A configuration in one line."""
    return ", ".join(f"{name} {number(config[key])}" for name, key in zip(names(tuple(config)), config, strict=True))


def number(value: Any) -> str:
    """A value for people."""
    from gtl.search.record import shown

    return shown(value)
