"""Whose turn it is: a bounded number of requests in work, shared between keys, and a bounded number that wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from serve.errors import overloaded

LONGEST_WAIT = 60.0
"""Seconds that a client is told to wait at most."""
REMEMBERED = 1000
"""Keys that have nothing to do and whose last turn is remembered."""


class FairShare:
    """At most `places` requests in work and `waiting` that wait.

    A place goes to the waiting key with the fewest requests in work; of several to the one whose last turn is longest
    ago; within a key to who came first. So a key that floods the queue makes itself wait and no other. Belongs to one
    event loop.
    """

    def __init__(self, places: int, waiting: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`places` >= 1, `waiting` >= 0."""
        assert places >= 1 and waiting >= 0
        self.places, self.waiting = places, waiting
        self._clock = clock
        self._in_work: dict[str, int] = {}
        self._queue: dict[asyncio.Future[None], str] = {}
        """Who waits -> their key, in the order in which they came."""
        self._last_turn: dict[str, int] = {}
        """Key -> number of its last turn, oldest first."""
        self._turns = 0
        self._held = 1.0
        """Seconds that a place is held, a moving average."""

    @property
    def num_in_work(self) -> int:
        """Requests that hold a place."""
        return sum(self._in_work.values())

    @property
    def num_waiting(self) -> int:
        """Requests that wait for one."""
        return len(self._queue)

    @asynccontextmanager
    async def place(self, key: str) -> AsyncIterator[None]:
        """Wait for a place and hold it.

        Raises:
            ApiError: 429 with Retry-After; too many wait already.
        """
        await self._enter(key)
        begin = self._clock()
        try:
            yield
        finally:
            self._held += 0.1 * (self._clock() - begin - self._held)
            self._leave(key)

    async def _enter(self, key: str) -> None:
        if self.num_in_work < self.places:  # then nobody waits
            self._give(key)
            return
        if self.num_waiting >= self.waiting:
            raise overloaded(self._wait())
        turn = asyncio.get_running_loop().create_future()
        self._queue[turn] = key
        try:
            await turn
        except asyncio.CancelledError:
            self._queue.pop(turn, None)
            if not turn.cancelled():  # its turn came in the moment in which it was given up
                self._leave(key)
            raise

    def _wait(self) -> float:
        """Seconds until a place may be free for one who comes now."""
        return min(LONGEST_WAIT, self._held * (self.num_waiting + 1) / self.places)

    def _give(self, key: str) -> None:
        self._in_work[key] = self._in_work.get(key, 0) + 1
        self._turns += 1
        self._last_turn.pop(key, None)
        self._last_turn[key] = self._turns

    def _leave(self, key: str) -> None:
        self._in_work[key] -= 1
        if not self._in_work[key]:
            del self._in_work[key]
        self._call_next()
        if len(self._last_turn) > REMEMBERED:
            self._forget_idle()

    def _call_next(self) -> None:
        while self._queue and self.num_in_work < self.places:
            turn = min(self._queue, key=self._rank)  # the first of equals
            key = self._queue.pop(turn)
            if not turn.done():  # else it was given up, and its task has yet to run
                self._give(key)
                turn.set_result(None)

    def _rank(self, turn: asyncio.Future[None]) -> tuple[int, int]:
        key = self._queue[turn]
        return self._in_work.get(key, 0), self._last_turn.get(key, 0)

    def _forget_idle(self) -> None:
        busy = {*self._in_work, *self._queue.values()}
        oldest = next((key for key in self._last_turn if key not in busy), None)
        if oldest is not None:
            del self._last_turn[oldest]
