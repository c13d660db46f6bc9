"""Which generator gets a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from gtl.generate.edit import looks_of
from serve.order import Order

STATS_S = 1.0
"""Between two reports of a replica."""
LOAD_S = 0.5
"""What it costs to bring an adapter into a slot, in seconds of work: so much busier may a replica be that has it."""


class ByAdapter(FIFOMixin, RequestRouter):
    """Asks the replica that is through with a request first.

    That is mostly one that has its adapters, and another one as soon as those are busier than loading them takes: an
    adapter that everybody wants spreads over as many replicas as are needed. Ray Serve's multiplexing would keep it on
    one (ray-project/ray#65691).
    """

    def initialize_state(self, **_: Any) -> None:
        """Nothing is sent yet."""
        self._sent: dict[ReplicaID, tuple[Mapping[str, Any], float]] = {}
        """Report of a replica, and seconds of work that it got from here since."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All of them, the best first."""
        order = order_of(pending_request)
        return [[replica] for replica in sorted(candidate_replicas, key=lambda replica: self._seconds(replica, order))]

    def _seconds(self, replica: RunningReplica, order: Order | None) -> float:
        return seconds(replica.routing_stats, self._since(replica), order)

    def _since(self, replica: RunningReplica) -> float:
        """Seconds of work that were sent after the replica's report."""
        report, sent = self._sent.get(replica.replica_id, ({}, 0.0))
        return sent if report == replica.routing_stats else 0.0

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Remember what was sent until the replica counts it itself."""
        replica, order = self._replicas.get(replica_id), order_of(pending_request)
        if replica is not None and order is not None:
            report = dict(replica.routing_stats)
            more = looks_of(order.edit, order.steps) * report.get("pace_s", 0.0)
            self._sent[replica_id] = report, self._since(replica) + more
        for gone in self._sent.keys() - self._replicas.keys():
            del self._sent[gone]


def order_of(pending_request: PendingRequest | None) -> Order | None:
    """What is to be drawn; None for other calls."""
    first = pending_request.args[0] if pending_request is not None and pending_request.args else None
    return first if isinstance(first, Order) else None


def seconds(report: Mapping[str, Any], sent: float, order: Order | None) -> float:
    """Until a replica could begin with an order.

    Args:
        report: Its newest one, see `Generator.record_routing_stats`; {} before the first.
        sent: Seconds of work that it got since.
        order: None: of nobody's adapters.
    """
    wanted = {name for name, _ in order.adapters} if order is not None else set()
    has_all = wanted <= set(report.get("adapters", ()))
    return float(report.get("busy_s", 0.0)) + sent + (0.0 if has_all else LOAD_S)
