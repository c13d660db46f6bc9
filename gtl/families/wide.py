"""An input layer that reads further channels, of an image that is to be edited (Brooks et al. 2023, arXiv 2211.09800).

Its own weights keep their names and shapes, so that whatever is for the model as it was published still fits it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from gtl.types import UserError

ADDED = "added"
"""The parameter's name in its layer."""


class WideConv2d(nn.Conv2d):
    """A convolution with weights for more channels beside its own."""

    added: nn.Parameter
    """[out, more, k, k]"""

    def forward(self, input: Tensor) -> Tensor:
        """Of [B, in + more, h, w]; of [B, in, h, w] what it would be without them."""
        own, more = input[:, : self.in_channels], input[:, self.in_channels :]
        found = super().forward(own)
        if not more.shape[1]:
            return found
        return found + nn.functional.conv2d(more, self.added, None, self.stride, self.padding, self.dilation)


def widen(module: nn.Module, layer: str, channels: int) -> WideConv2d:
    """Let a convolution of a module read so many channels more, by weights that are zero; one that does already stays.

    Raises:
        UserError: it has something else around it, such as an adapter, or reads another number.
    """
    conv = check_widens(layer, module.get_submodule(layer))
    if isinstance(conv, WideConv2d):
        if conv.added.shape[1] != channels:
            raise UserError(f"{layer}: reads {conv.added.shape[1]} further channels already, and not {channels}")
        return conv
    options: dict[str, Any] = {name: getattr(conv, name) for name in ("stride", "padding", "dilation")}
    with torch.device("meta"):
        wide = WideConv2d(conv.in_channels, conv.out_channels, cast(Any, conv.kernel_size), **options)
    wide.weight, wide.bias = conv.weight, conv.bias
    weight = conv.weight
    wide.added = nn.Parameter(weight.new_zeros(weight.shape[0], channels, *weight.shape[2:]), requires_grad=False)
    module.set_submodule(layer, wide)
    return wide


def check_widens(name: str, layer: nn.Module) -> nn.Conv2d:
    """A layer that can be given further channels, or has them.

    Raises:
        UserError: it is something else, or has something around it, such as an adapter.
    """
    if isinstance(layer, WideConv2d):
        return layer
    if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros" or layer.groups != 1:
        what = "has an adapter on it" if hasattr(layer, "base_layer") else f"is a {type(layer).__name__}"
        raise UserError(f"{name}: {what}; a plain convolution can be given further channels")
    return layer


def wide_layers(module: nn.Module) -> Iterator[tuple[str, WideConv2d]]:
    """The layers that read further channels, with their names."""
    for name, layer in module.named_modules():
        if isinstance(layer, WideConv2d):
            yield name, layer


def is_wide(module: nn.Module) -> bool:
    """Whether it sees an image that is to be edited."""
    return any(True for _ in wide_layers(module))


def joined(layer: WideConv2d) -> Tensor:
    """One weight [out, in + more, k, k] for all channels."""
    return torch.cat([layer.weight, layer.added.to(layer.weight.dtype)], dim=1).detach()


def settle(module: nn.Module) -> bool:
    """Make such layers plain convolutions of all channels, and say so in the module's config; whether there are any."""
    found = list(wide_layers(module))
    for name, layer in found:
        weight = joined(layer)
        options: dict[str, Any] = {key: getattr(layer, key) for key in ("stride", "padding", "dilation")}
        with torch.device("meta"):
            plain = nn.Conv2d(weight.shape[1], weight.shape[0], cast(Any, layer.kernel_size), **options)
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        module.set_submodule(name, plain)
        cast(Any, module).register_to_config(in_channels=weight.shape[1])
    return bool(found)
