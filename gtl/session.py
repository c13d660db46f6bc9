"""The one way into a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gtl.types import UserError


@dataclass(frozen=True)
class Cluster:
    """What the connected cluster has in all, used or not."""

    cpus: float
    gpus: float
    gpus_of_a_node: float = 0.0
    """Of the one that has most."""


def get(reference: Any) -> Any:
    """`ray.get`, with a user's mistake on the cluster raised here as the one line it is.

    Raises:
        UserError: the task raised one.
    """
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise


@contextlib.contextmanager
def session(*, dashboard: bool = False) -> Iterator[Cluster]:
    """A connection for the length of a command; a local cluster that it started ends with it.

    `dashboard` starts a local cluster with one: it costs seconds, and what cleans up after runs within runs needs it.

    Joins the cluster that RAY_ADDRESS names (auto: the one that `ray start` began here), else starts one. Without being
    told it joins none: what runs here may be another command's own, which ends with that command.

    Raises:
        UserError: RAY_ADDRESS names a cluster that does not answer.
    """
    import ray

    mine = not ray.is_initialized()
    if mine:
        _initialize(dashboard)
    try:
        resources = ray.cluster_resources()
        largest = max((node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
        yield Cluster(resources.get("CPU", 0), resources.get("GPU", 0), largest)
    finally:
        if mine:
            ray.shutdown()


def begins_one() -> bool:
    """Whether a session would begin a cluster of its own, on this machine."""
    import ray

    return not ray.is_initialized() and os.environ.get("RAY_ADDRESS", "") in ("", "local")


def _initialize(dashboard: bool) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not begins_one():
        address = os.environ["RAY_ADDRESS"]
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            token = (
                "" if os.environ.get("RAY_AUTH_MODE") == "token" else "; if it wants a token, set RAY_AUTH_MODE=token"
            )
            raise UserError(f"RAY_ADDRESS: {address!r}: no Ray cluster answers there ({error}){token}") from error
        return
    ray.init(address="local", include_dashboard=dashboard, **quiet)


def free_port() -> int:
    """One of this machine's loopback address at which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
