"""Where the fp32 values of each trained parameter live under each ZeRO stage.

DeepSpeed updates flat fp32 partitions. A fragment says which slice of which partition belongs to which slice of a
named parameter on this rank. Checkpoints and the EMA are written in terms of fragments, so they know no stage.
The attributes read here are DeepSpeed's own (0.18 to 0.19); this file is the only one that knows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """This rank's part of one parameter: `partition[offset:][:size]` is `parameter[start:][:size]`, both flat."""

    partition: Tensor
    offset: int
    start: int
    size: int

    def read(self, values: Tensor) -> Tensor:
        """The fragment's slice of a tensor laid out like the partition."""
        return values.detach().reshape(-1)[self.offset : self.offset + self.size]

    def write(self, values: Tensor, parameter: Tensor) -> None:
        """Copy the fragment's slice of a whole parameter into a tensor laid out like the partition."""
        flat = parameter.reshape(-1)[self.start : self.start + self.size]
        if values.dim() == 1:
            values.detach()[self.offset : self.offset + self.size].copy_(flat)
        else:
            values.detach().copy_(flat.view(values.shape))


def find_fragments(parameters: Mapping[str, Any], optimizer: Any, stage: int) -> dict[str, Fragment]:
    """The fragments of this rank by parameter name; a name without values here is left out.

    `optimizer` is what `deepspeed.initialize` returned.
    """
    found: dict[str, Fragment] = {}
    for name, parameter in parameters.items():
        if stage == 0:
            found[name] = Fragment(parameter, 0, 0, parameter.numel())
        elif stage == 3:
            group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = padded * dist.get_rank()
            size = min(padded, parameter.ds_numel - start)
            if size > 0:
                found[name] = Fragment(optimizer.fp32_partitioned_groups_flat[group], offset, start, size)
        elif (mapping := parameter._hp_mapping) is not None:
            partition = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            owned, own = mapping.hp_fragment_address, mapping.lp_fragment_address
            found[name] = Fragment(partition, owned.start, own.start, owned.numel)
    return found


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape before any sharding."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def distinct(fragments: Mapping[str, Fragment]) -> list[Tensor]:
    """The partitions behind fragments, each once."""
    return list({id(fragment.partition): fragment.partition for fragment in fragments.values()}.values())


def gather(
    fragment: Fragment | None,
    values: Sequence[Tensor],
    rows: int,
    shape: Sequence[int],
    device: torch.device,
    sharded: bool,
) -> list[Tensor]:
    """Put `rows` tensors of one parameter together: whole fp32 copies in CPU memory on rank 0, [] elsewhere.

    Collective. `values` are laid out like the fragment's partition, for example the moments; there are none on a rank
    without a fragment. If not `sharded`, every rank has all of it and rank 0 copies its own.
    """
    whole = torch.zeros(rows, math.prod(shape), dtype=torch.float32, device=device)
    if fragment is not None:
        for row, value in zip(whole, values, strict=True):
            row[fragment.start : fragment.start + fragment.size] = fragment.read(value)
    if sharded:
        # Each element is non-zero on one rank only. As integers the sum keeps every bit, also that of -0.0.
        dist.reduce(whole.view(torch.int32), dst=0)
    if dist.get_rank() != 0:
        return []
    return [row.reshape(tuple(shape)) for row in whole.cpu()]


def refresh(parameter: nn.Parameter, value: Tensor) -> None:
    """Set the weights that the forward pass reads to a whole parameter, after its fp32 partition was set.

    Not collective: every rank has the whole value.
    """
    if not hasattr(parameter, "ds_tensor"):
        parameter.data.copy_(value)
        return
    local = parameter.ds_tensor
    start = local.numel() * dist.get_rank()
    part = value.reshape(-1)[start : start + local.numel()]
    local.data[: part.numel()].copy_(part)
    # A copy under train.zero.hpz, which the next forward pass makes again.
    parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]
    if parameter.data.numel() == value.numel():  # small parameters stay gathered between steps
        parameter.data.copy_(value.view(parameter.data.shape))
