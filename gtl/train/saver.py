"""Writes in the background, one after the other, while training goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

BRIEF_S = 1.0
"""A shorter write is waited for where it has to be, and begins no earlier: runs alike save at the same steps."""


class Saver:
    """One thread for what a run writes to its store. What failed there is raised by the next call of any method."""

    def __init__(self) -> None:
        """Nothing is written yet."""
        self.seconds = 0.0
        """That the last write took."""
        self._pool = ThreadPoolExecutor(1, "saver")
        self._last: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Begin to write, once what was begun before is written."""
        self.wait()
        self._last = self._pool.submit(self._timed, write)

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

    def _timed(self, write: Callable[[], None]) -> None:
        begun = time.perf_counter()
        write()
        self.seconds = time.perf_counter() - begun

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


class Cadence:
    """When a run's state is to be saved, and to be waited for, so that no kill costs more than `every` steps.

    Steps go on beside a write only while those behind the newest whole checkpoint are no more. A write begins as many
    steps early as the last one took, by a quarter of `every` at most, and so does not hold training up.
    """

    def __init__(self, every: int, done: int, saver: Saver) -> None:
        """A run that goes on from the checkpoint of `done` steps; 0: from none."""
        self.every = every
        self._saver = saver
        self._whole = self._begun = done
        self._asked = False

    def begin(self, step: int) -> None:
        """The checkpoint of this step has begun to be written, and all before it are whole."""
        self._whole, self._begun, self._asked = self._begun, step, False
        self.hold(step)

    def hold(self, step: int) -> None:
        """Wait for what is being written, if one step more could be lost with too many others.

        Raises:
            Exception: what writing met.
        """
        if step + 1 - self._whole > self.every:
            self._saver.wait()
            self._whole = self._begun

    def is_early(self, step: int, step_seconds: float) -> bool:
        """Whether the step after this one, which took so long, is to be saved for the write to be whole in time.

        Says so once.
        """
        seconds = self._saver.seconds
        lead = 0 if seconds < BRIEF_S else min(math.ceil(seconds / step_seconds), self.every // 4)
        asks = not self._asked and lead > 0 and step + 1 >= self._begun + self.every - lead
        self._asked |= asks
        return asks
