"""Weights of the model itself that move, and where they start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gtl.adapters.delta import tensor_of
from gtl.adapters.merge import merge
from gtl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


class BaseWeights:
    """Marks parameters of the base model, after an earlier adapter was merged into it if there is one."""

    def __init__(self, init: str | None) -> None:
        """`init` is the earlier adapter's name, for messages."""
        self._name = init
        self._kept: dict[str, Tensor] = {}
        """What the earlier adapter moved and this tuner does not."""

    def mark(self, parts: Mapping[str, nn.Module], names: Sequence[str], init: Path | None) -> dict[str, nn.Parameter]:
        """Freeze everything but the `part.parameter.name`s; `init` is the earlier adapter's folder.

        Raises:
            UserError: the earlier adapter does not fit the parts.
        """
        for module in parts.values():
            module.requires_grad_(False)
        changed = set() if init is None else self._continue_from(parts, init)
        chosen: dict[str, nn.Parameter] = {}
        for name in names:
            part, _, own = name.partition(".")
            parameter = parts[part].get_parameter(own)
            parameter.requires_grad_(True)
            chosen[name] = parameter
        for name in sorted(changed - chosen.keys()):
            part, _, own = name.partition(".")
            self._kept[name] = tensor_of(parts[part], own).detach().cpu().clone()
        return chosen

    def all_moved(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trained tensors, with what the earlier adapter moved beside them: all that differs from the base."""
        return {**self._kept, **tensors}

    def _continue_from(self, parts: Mapping[str, nn.Module], init: Path) -> set[str]:
        try:
            return merge(parts, ((init, 1.0),))
        except UserError as error:
            raise UserError(f"tuner.init: {self._name}: {error}") from None
