"""Requests that come twice: what carries an Idempotency-Key is drawn once and answered as often as it is asked.

As draft-ietf-httpapi-idempotency-key-header has it, but for one point: who asks again while it is still being drawn
waits for the same answer, instead of being sent away with 409.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from serve.errors import key_reused
from serve.schema import MAX_SEED, Drawing

if TYPE_CHECKING:
    from serve.uploads import Uploads

HEADER = "idempotency-key"
KEPT_S = 600.0
"""After which an answer is forgotten."""
KEPT_BYTES = 256 * 2**20
"""Of all answers that are kept; the oldest go first."""


@dataclass
class Entry:
    """A request that was sent with a key."""

    sent: bytes
    """Digest of what it asks for."""
    answer: asyncio.Future[bytes]
    since: float | None = None
    """When the answer was there; None before."""


class Answers:
    """Of one ingress; another one has its own, and draws the same picture again (see `seed_of`).

    An answer is kept for `seconds`, and all of them together have at most `most` bytes. An error is not kept: the next
    try is a try. What is drawn goes on when its client leaves, since that is whom the key is for.
    """

    def __init__(
        self, seconds: float = KEPT_S, most: int = KEPT_BYTES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Nothing is kept yet."""
        self._seconds, self._most, self._clock = seconds, most, clock
        self._entries: dict[bytes, Entry] = {}
        self._bytes = 0

    async def once(
        self, name: bytes | None, sent: bytes, draw: Callable[[], Coroutine[Any, Any, bytes]]
    ) -> tuple[bytes, bool]:
        """The answer to a request, and whether it is that of one before.

        Args:
            name: Who asks what route with what key, see `name_of`; None: this request is like no other.
            sent: What it asks for, see `digest_of`.
            draw: Makes the answer.

        Raises:
            ApiError: 422, the key was another request's.
            Exception: what `draw` raises.
        """
        if name is None:
            return await draw(), False
        self._forget()
        known = self._entries.get(name)
        if known is not None and known.sent != sent:
            raise key_reused()
        entry = known or self._begin(name, sent, draw)
        return await asyncio.shield(entry.answer), known is not None

    def _begin(self, name: bytes, sent: bytes, draw: Callable[[], Coroutine[Any, Any, bytes]]) -> Entry:
        # In a context of its own: Ray Serve cancels what was begun in that of a request when its client leaves.
        answer = contextvars.Context().run(asyncio.ensure_future, draw())
        entry = self._entries[name] = Entry(sent, answer)
        answer.add_done_callback(lambda _: self._end(name, entry))
        return entry

    def _end(self, name: bytes, entry: Entry) -> None:
        if entry.answer.cancelled() or entry.answer.exception() is not None:
            del self._entries[name]
            return
        entry.since = self._clock()
        self._entries[name] = self._entries.pop(name)  # those that are done are in the order in which they were
        self._bytes += len(entry.answer.result())
        self._forget()

    def _forget(self) -> None:
        end = self._clock() - self._seconds
        for name, entry in list(self._entries.items()):
            if entry.since is None:
                continue
            if entry.since > end and self._bytes <= self._most:
                return
            self._bytes -= len(entry.answer.result())
            del self._entries[name]


def name_of(request: Request) -> bytes | None:
    """Who asks what route with what Idempotency-Key; None without one."""
    key = request.headers.get(HEADER)
    return None if key is None else hashed(_secret(request), request.url.path.encode(), key.encode())


def digest_of(asked: Drawing, uploads: Uploads | None) -> bytes:
    """Of what is asked for, however its JSON or form was written."""
    files = [] if uploads is None else [file or b"" for file in uploads]
    return hashed(asked.model_dump_json().encode(), *files)


def seed_of(request: Request, n: int) -> int:
    """A seed for who gave none; the same again for the same Idempotency-Key, whichever ingress is asked."""
    key = request.headers.get(HEADER)
    if key is None:
        return secrets.randbelow(2**32)
    return int.from_bytes(hashed(_secret(request), key.encode())[:4], "big") % (MAX_SEED - n)


def _secret(request: Request) -> bytes:
    return request.headers.get("authorization", "").encode()


def hashed(*parts: bytes) -> bytes:
    """SHA-256 of several parts that cannot be taken for others."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
