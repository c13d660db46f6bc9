"""Progress of what a command does."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class Bar:
    """Progress on stderr: a live bar in a terminal, a line now and then in a log."""

    def __init__(self) -> None:
        self._live: object | None = None
        self._phase = ""
        self._began = 0.0, 0
        self._printed = 0.0

    def __call__(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Show that `done` of `total` of a phase is through."""
        now = time.monotonic()
        if phase != self._phase:
            self._began = now, done
        if sys.stderr.isatty():
            self._draw(phase, done, total, detail)
        elif phase != self._phase or done >= total or now - self._printed > 10:
            counts = f" {done}/{total}" if total else ""
            print(f"{phase}{counts} {detail}".rstrip() + self._left(now, done, total), file=sys.stderr, flush=True)
            self._printed = now
        self._phase = phase

    def _left(self, now: float, done: int, total: int) -> str:
        """How long the phase still takes at its rate so far, which a resumed one does not begin at 0."""
        began, first = self._began
        if not first < done < total:
            return ""
        from gtl.report.facts import duration

        return f"  {duration((total - done) * (now - began) / (done - first))} left"

    def _draw(self, phase: str, done: int, total: int, detail: str) -> None:
        from rich import progress
        from rich.console import Console

        if phase != self._phase:
            self.close()
            text = progress.TextColumn("{task.description:<12}"), progress.TextColumn("{task.fields[detail]}")
            # What has no end to count towards turns while it lasts, and leaves no line behind.
            columns = (
                (text[0], progress.BarColumn(), progress.MofNCompleteColumn(), text[1], progress.TimeRemainingColumn())
                if total
                else (progress.SpinnerColumn(), *text, progress.TimeElapsedColumn())
            )
            self._live = progress.Progress(*columns, console=Console(stderr=True), transient=not total)
            self._live.start()
            self._live.add_task(phase, total=total or None, detail="")
        bar = self._live
        assert isinstance(bar, progress.Progress)
        bar.update(bar.task_ids[0], completed=done, total=total or None, detail=detail)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the last bar on the screen and let go of it."""
        if self._live is not None:
            self._live.stop()  # type: ignore[attr-defined]
            self._live = None
