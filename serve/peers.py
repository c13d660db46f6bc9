"""The ingresses among themselves."""

from __future__ import annotations

from typing import Any

from ray import serve

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
