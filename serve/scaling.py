"""How many generators there should be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext


class ByWork:
    """As many replicas as get done within `target_s` seconds what is asked of all of them.

    Ray Serve's own policy counts requests; one of them may be 4 steps of a small picture or 200 of a large one.
    """

    def __init__(self, target_s: float = 10.0) -> None:
        """`target_s` is what a new request may have to wait for on average."""
        self.target_s = target_s

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number, within Ray Serve's bounds; nothing is remembered."""
        busy = sum((context.aggregated_metrics or {}).get("busy_s", {}).values())
        wanted = math.ceil(busy / self.target_s)
        if context.total_num_requests > 0:
            wanted = max(wanted, 1)  # those who ask while there is no replica are in no replica's count
        lowest, highest = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return min(max(wanted, lowest), highest), {}
