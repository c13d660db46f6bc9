"""Only the heads of a model move."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gtl.adapters.delta import write_delta
from gtl.config.tuners import HeadTuner
from gtl.tuners.base_weights import BaseWeights

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gtl.families.base import Family


class Head:
    """All weights of the heads; what they read of the network under them is in the cache."""

    def __init__(self, config: HeadTuner, family: Family) -> None:
        """Nothing is loaded yet."""
        self.config = config
        self.family = family
        self._weights = BaseWeights(config.init)

    def apply(self, parts: dict[str, nn.Module], seed: int, init: Path | None = None) -> dict[str, nn.Parameter]:
        """Freeze everything but the heads."""
        names = [f"{head}.{name}" for head in self.family.heads for name, _ in parts[head].named_parameters()]
        return self._weights.mark(parts, names, init)

    def export(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write the heads."""
        write_delta(self._weights.all_moved(tensors), folder)
