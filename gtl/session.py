"""The one way into a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gtl.types import UserError


@dataclass(frozen=True)
class Cluster:
    """What a cluster has in all, used or not, with what its autoscaler may add."""

    cpus: float
    gpus: float
    gpus_of_a_node: float = 0.0
    """Of the machine that has most."""
    gpus_now: float | None = None
    """Without what an autoscaler may add; None: it is all there."""

    @property
    def gpus_at_hand(self) -> float:
        """GPUs to take where nobody says how many: those that are there, or of one machine where none is there yet."""
        return self.gpus if self.gpus_now is None else self.gpus_now or self.gpus_of_a_node


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
        yield capacity()
    finally:
        if mine:
            ray.shutdown()


def capacity() -> Cluster:
    """Of the connected cluster: what it has, or has once its autoscaler has started every machine that it may."""
    import ray
    from ray._private.state import state  # as Ray Train finds out: there is no public way

    config = state.get_cluster_config()  # None where nothing scales
    groups = [] if config is None else [(dict(one.resources), one.max_count) for one in config.node_group_configs]
    return grown([node["Resources"] for node in ray.nodes() if node["Alive"]], groups)


def grown(nodes: Sequence[Mapping[str, float]], groups: Sequence[tuple[Mapping[str, float], int]]) -> Cluster:
    """What machines have, or all that there may be of their groups.

    Args:
        nodes: Resources of those that are there.
        groups: Resources of a machine and the most machines, for every kind that the autoscaler starts; -1 for no
            bound, of which only what is there counts.
    """

    def there(kind: str) -> float:
        return sum(node.get(kind, 0) for node in nodes)

    def most(kind: str) -> float:
        return max(there(kind), sum(each.get(kind, 0) * max(0, number) for each, number in groups))

    machines = [*nodes, *(each for each, number in groups if number)]
    largest = max((machine.get("GPU", 0) for machine in machines), default=0)
    return Cluster(most("CPU"), most("GPU"), largest, there("GPU"))


def _initialize(dashboard: bool) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"RAY_ADDRESS: {address!r}: no Ray cluster answers there ({error})") from error
        return
    ray.init(address="local", include_dashboard=dashboard, **quiet)
