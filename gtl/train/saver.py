"""Writes in the background, one after the other, while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Saver:
    """One thread for what a run writes to its store. What failed there is raised by the next call of any method."""

    def __init__(self) -> None:
        """Nothing is written yet."""
        self._pool = ThreadPoolExecutor(1, "saver")
        self._last: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Begin to write, once what was begun before is written."""
        self.wait()
        self._last = self._pool.submit(write)

    def check(self) -> None:
        """Find out without waiting whether what was begun has failed.

        Raises:
            Exception: what writing met.
        """
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Until everything is written.

        Raises:
            Exception: what writing met.
        """
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Everything is written, also where training failed; an error of its own is not hidden by one of these."""
        try:
            if error is None:
                self.wait()
        finally:
            self._pool.shutdown()
