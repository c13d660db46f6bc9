"""Every weight of a part moves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gtl.adapters.channels import split_channels, write_channels
from gtl.adapters.delta import write_delta
from gtl.config.tuners import FullTuner
from gtl.tuners.base import trained_parts
from gtl.tuners.base_weights import BaseWeights

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gtl.families.base import Family


class Full:
    """All weights of the parts that the recipe names."""

    def __init__(self, config: FullTuner, family: Family) -> None:
        """Nothing is loaded yet."""
        self.config = config
        self._weights = BaseWeights(config.init)

    def apply(self, parts: dict[str, nn.Module], seed: int, init: Path | None = None) -> dict[str, nn.Parameter]:
        """Freeze everything but the named parts, all of those given if none is named."""
        trained = trained_parts(self.config.train or list(parts), list(parts))
        names = [f"{part}.{name}" for part in trained for name, _ in parts[part].named_parameters()]
        return self._weights.mark(parts, names, init)

    def export(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write the new values of all that differs from the base, and beside them what is not in it."""
        added, own = split_channels(self._weights.all_moved(tensors))
        write_delta(own, folder)
        write_channels(added, folder)
