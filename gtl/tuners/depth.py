"""Freeze depth: the first k blocks, in execution order, do not learn."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gtl.types import UserError

if TYPE_CHECKING:
    from torch import nn

    from gtl.families.base import Family


def resolve_depth(depth: int | float, num_blocks: int, key: str = "tuner.freeze_depth") -> int:
    """The number of frozen blocks: an int is one, a float in [0, 1) is a share of the blocks, rounded down.

    Raises:
        UserError: it is more than there are.
    """
    # 0.29 * 100 is 28.999999999999996
    resolved = math.floor(depth * num_blocks + 1e-9) if isinstance(depth, float) else depth
    if resolved > num_blocks:
        raise UserError(f"{key}: {depth}: the model has {num_blocks} blocks")
    return resolved


def frozen_prefixes(
    family: Family, main: nn.Module, depth: int | float, key: str = "tuner.freeze_depth"
) -> tuple[str, ...]:
    """Module-name prefixes that a freeze depth keeps from learning: the first blocks, and all in front of them.

    Raises:
        UserError: the depth is beyond the model's blocks.
    """
    blocks = family.blocks(main)
    first = blocks[: resolve_depth(depth, len(blocks), key)]
    return (*family.embedders(main), *(prefix for block in first for prefix in block)) if first else ()


def is_under(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a module or parameter is one of the modules, or lies inside one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
