"""How sure a measured share is."""

from __future__ import annotations

import math


def wilson(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927, JASA 22), of 95 % unless `z` says otherwise.

    Raises:
        ValueError: nothing was counted, or more hits than tries.
    """
    if not 0 <= hits <= total or total == 0:
        raise ValueError(f"{hits} of {total}")
    share, spread = hits / total, z * z / total
    middle = share + spread / 2
    margin = z * math.sqrt((share * (1 - share) + spread / 4) / total)
    return max(0.0, (middle - margin) / (1 + spread)), min(1.0, (middle + margin) / (1 + spread))
