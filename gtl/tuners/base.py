"""What a tuner says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gtl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


class Tuner(Protocol):
    """Which weights move. Made from its config and the family: `make_tuner(config, family)`."""

    def apply(self, parts: dict[str, nn.Module], seed: int, init: Path | None = None) -> dict[str, nn.Parameter]:
        """Freeze everything, mark or inject what moves, return it as `part.parameter.name` -> parameter.

        Modules change in place; weights stay as they are stored, where nothing has to be computed from them. The same
        seed gives the same initial weights in every process. `init` is the folder of the published adapter to continue
        from. The first of the parts is the one that the objective is about.

        Raises:
            UserError: a target matches nothing, the freeze depth is beyond the block count, or `init` does not fit.
        """
        ...

    def export(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write the trained tensors (named as `apply` returned them) as files that others load.

        Needs no engine and no GPU, but this tuner's own `apply` where the method changes the base weight.
        """
        ...


def train_added(parts: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Let weights of further input channels move, which begin at zero and belong to no published weight; by name."""
    from gtl.families.wide import ADDED, wide_layers

    found = {
        f"{part}.{layer}.{ADDED}": wide.added for part, module in parts.items() for layer, wide in wide_layers(module)
    }
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def trained_parts(train: Sequence[str] | None, parts: Sequence[str]) -> list[str]:
    """The parts that `tuner.train` names; for None the first of `parts`, which an objective can train.

    Raises:
        UserError: one is not among them.
    """
    for part in train or ():
        if part not in parts:
            raise UserError(f"tuner.train: {part!r}: what can be trained here is {', '.join(parts)}")
    return list(train or parts[:1])
