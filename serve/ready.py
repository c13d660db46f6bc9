"""Whether generators are there."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

READY_S = 5.0
"""Within which a generator says that it is there."""


async def missing(generators: Mapping[str, DeploymentHandle[Any]]) -> list[str]:
    """Names of the bases that have no generator."""
    asked = [generator.status.remote() for generator in generators.values()]
    found = await asyncio.gather(*(asyncio.wait_for(one, READY_S) for one in asked), return_exceptions=True)
    return [
        name for name, one in zip(generators, found, strict=True)
        if isinstance(one, BaseException) and not (isinstance(one, asyncio.TimeoutError) and await runs(name))
    ]  # fmt: skip


async def runs(name: str) -> bool:
    """Whether a base has a generator, which answers only when it has room for more."""
    application = serve.get_replica_context().app_name
    told = await asyncio.to_thread(serve.status)
    states = told.applications[application].deployments[f"Generator:{name}"].replica_states
    return any(state == "RUNNING" for state, number in states.items() if number)
