"""A player's weights where and in the dtype that the arithmetic reads them; read from their files only now."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def place(module: nn.Module, dtype: torch.dtype, device: torch.device | str, changing: Collection[Tensor] = ()) -> None:
    """Move all weights, in place and one by one: what moves in training as fp32, the rest in `dtype`.

    Buffers that are `changing` move in training, too.
    """
    moving = {id(tensor) for tensor in changing}
    for tensor in chain(module.parameters(), module.buffers()):
        stored = stored_as(tensor, torch.float32 if id(tensor) in moving else dtype)
        tensor.data = value_of(tensor, device).to(device, stored)


def shard(player: nn.Module, dtype: torch.dtype, device: torch.device, config: dict[str, Any]) -> None:
    """Cut every parameter into the ranks' shares (ZeRO-3, arXiv 1910.02054), in place; for dtypes see `place`.

    Collective. Each is read from its file, cast or rounded, sent by rank 0 to the others and cut before the next one is
    looked at: a process holds its own share and one parameter, however large the model is. What other ranks have
    loaded is not read at all.
    """
    import deepspeed

    deepspeed.init_distributed(dist_init_required=False)  # in DeepSpeed's own words; the group stands already
    arrival = Arrival(player, dtype, device)
    # One for all engines of a process, where train.zero.hpz asks for one.
    group = deepspeed.utils.groups._get_zero_param_intra_parallel_group()
    deepspeed.zero.Init(module=arrival, config_dict_or_path=config, zero_param_parallel_group=group)
    arrival.leave()
    for buffer in player.buffers():
        buffer.data = buffer.data.to(device, stored_as(buffer, dtype))


def stored_as(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a weight in training, in arithmetic of `dtype`."""
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if tensor.requires_grad else dtype


def size_of(tensor: Tensor, dtype: torch.dtype) -> int:
    """Bytes of a weight in training."""
    return tensor.numel() * stored_as(tensor, dtype).itemsize


def promise(numel: int, make: Callable[[torch.device | str], Tensor]) -> nn.Parameter:
    """A frozen parameter of so many bytes, which are made when it is placed; before it takes no memory."""
    parameter = nn.Parameter(torch.zeros((), dtype=torch.uint8).expand(numel), requires_grad=False)
    parameter.make = make  # type: ignore[attr-defined]
    return parameter


def value_of(tensor: Tensor, device: torch.device | str) -> Tensor:
    """What a tensor holds, or was promised to hold; what that is made of can be freed after it."""
    make: Callable[[torch.device | str], Tensor] | None = forget(tensor)
    return tensor.data if make is None else make(device)


def forget(tensor: Tensor) -> Any:
    """Take away how a promised tensor is made."""
    return tensor.__dict__.pop("make", None)


class Arrival(nn.Module):
    """The parameters of a module, each brought onto the device in the moment it is asked for.

    All of them use the same memory, one after the other: what an allocator keeps of freed copies adds up.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Nothing is touched yet."""
        super().__init__()
        self.module = module
        self._dtype = dtype
        largest = max(size_of(parameter, dtype) for parameter in module.parameters())
        self._room = torch.empty(largest, dtype=torch.uint8, device=device)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """All of them, as the module's own iterator gives them. The one before has to be cut by then."""
        for parameter in self.module.parameters(recurse):
            room = self._room[: size_of(parameter, self._dtype)]
            arrived = room.view(stored_as(parameter, self._dtype)).view(parameter.shape)
            if dist.get_rank() == 0:
                arrived.copy_(value_of(parameter, self._room.device))
            else:
                forget(parameter)
            parameter.data = arrived
            yield parameter

    def leave(self) -> None:
        """Free the memory, since DeepSpeed holds on to the module that it cut."""
        self._room = self._room.new_empty(0)
