"""The ingresses among themselves."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from ray import serve

Told = TypeVar("Told")

PATIENCE_S = 10.0


async def ask_all(method: str) -> list[Any]:
    """What a method of every ingress returns, the one among them that asks. For what is rare: none of them may refuse.

    Raises:
        TimeoutError: one does not answer.
        Exception: what one of them raises.
    """
    here = serve.get_replica_context()
    ingresses = serve.get_deployment_handle(here.deployment, here.app_name)
    return await ingresses.broadcast(method).results_async(timeout_s=PATIENCE_S)


class Together(Generic[Told]):
    """Work that many may ask for at once: it is done for all who came before it begins, and never twice at a time."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, Told]]) -> None:
        """`work` tells what its callers wait for."""
        self._work = work
        self._busy = asyncio.Lock()
        self._next: asyncio.Future[Told] | None = None

    async def __call__(self) -> Told:
        """What the work tells that begins now, or after that which is being done."""
        if self._next is None:
            # In a context of its own: Ray Serve cancels what was begun in that of a request when its client leaves.
            self._next = contextvars.Context().run(asyncio.ensure_future, self._run())
        return await asyncio.shield(self._next)

    async def _run(self) -> Told:
        async with self._busy:
            self._next = None
            return await self._work()
