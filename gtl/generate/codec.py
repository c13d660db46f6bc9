"""A model's codec with the weights of one adapter in it, for as long as a picture of that one is encoded or decoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def wearing(codec: nn.Module | None, own: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it a codec has other weights in place of those of these names. One at a time: it is changed in place."""
    before = {name: codec.get_parameter(name).data for name in own} if codec is not None else {}

    def put(weights: Mapping[str, Tensor]) -> None:
        for name in before:
            parameter = cast("nn.Module", codec).get_parameter(name)
            parameter.data = weights[name].to(parameter.device, parameter.dtype)

    try:
        put(own)
        yield
    finally:
        put(before)
