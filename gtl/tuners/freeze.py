"""The model's own weights behind a freeze depth move, or some kinds of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gtl.adapters.delta import write_delta
from gtl.config.tuners import FreezeTuner
from gtl.tuners.base_weights import BaseWeights
from gtl.tuners.depth import frozen_prefixes, is_under
from gtl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gtl.families.base import Family


class Freeze:
    """All weights of the main part, and of its critic, but those of the first blocks; and all of heads.

    What is behind the blocks is never frozen.
    """

    def __init__(self, config: FreezeTuner, family: Family) -> None:
        """Nothing is loaded yet."""
        self.config = config
        self.family = family
        self._weights = BaseWeights(config.init)

    def apply(self, parts: dict[str, nn.Module], seed: int, init: Path | None = None) -> dict[str, nn.Parameter]:
        """Freeze everything but what the recipe chooses."""
        part = self.family.main
        names = [f"{part}.{name}" for name in self.chosen(parts[part])]
        for critic in self.family.critics:
            depth = self.config.discriminator_depth
            frozen = frozen_prefixes(self.family, parts[critic], depth, "tuner.discriminator_depth")
            own = (name for name, _ in parts[critic].named_parameters() if not is_under(name, frozen))
            names += [f"{critic}.{name}" for name in own]
        names += [f"{head}.{name}" for head in self.family.heads for name, _ in parts[head].named_parameters()]
        return self._weights.mark(parts, names, init)

    def chosen(self, main: nn.Module) -> list[str]:
        """Names of the main part's parameters that move, in order.

        Raises:
            UserError: there is none, or the freeze depth is beyond the block count.
        """
        only = self.config.only
        frozen = frozen_prefixes(self.family, main, self.config.freeze_depth)
        wanted = {name for kind in only for name in self.of_kind(main, kind)} if only else None
        names = [
            name for name, _ in main.named_parameters()
            if not is_under(name, frozen) and (wanted is None or name in wanted)
        ]  # fmt: skip
        if not names:
            raise UserError(
                f"tuner.only: {', '.join(only or ())}: no such weights behind tuner.freeze_depth "
                f"{self.config.freeze_depth}; freeze fewer of the {len(self.family.blocks(main))} blocks"
            )
        return names

    def of_kind(self, main: nn.Module, kind: str) -> Iterator[str]:
        """Names of the parameters of one kind that `tuner.only` knows."""
        from torch import nn

        if kind == "bias":
            yield from (name for name, _ in main.named_parameters() if name.rpartition(".")[2] == "bias")
            return
        if kind == "norm":
            norms = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
            modules = tuple(name for name, module in main.named_modules() if isinstance(module, norms))
        else:
            modules = self.family.cross_attentions(main)
        yield from (name for name, _ in main.named_parameters() if is_under(name, modules))

    def export(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write the new values of all that differs from the base."""
        write_delta(self._weights.all_moved(tensors), folder)
