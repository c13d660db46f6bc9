"""A frozen base in 4 or 8 bits a weight, by bitsandbytes: QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

Of its own layers the one for int8 rounds activations too (arXiv 2208.07339), and there is none for fp8. Its kernels
serve all three kinds, and ZeRO partitions codes and scales that are plain parameters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtl.train.place import promise
from gtl.types import UserError


@dataclass(frozen=True)
class Format:
    """How weights are stored."""

    bits: int
    """Of a weight."""
    block: int
    """Weights that share an fp32 scale, which is the largest magnitude among them."""

    def code_bytes(self, numel: int) -> int:
        """Of so many weights."""
        return math.ceil(numel * self.bits / 8)

    def scale_bytes(self, numel: int) -> int:
        """Of so many weights."""
        return 4 * math.ceil(numel / self.block)

    def nbytes(self, numel: int) -> int:
        """Of so many weights, with their scales."""
        return self.code_bytes(numel) + self.scale_bytes(numel)


FORMATS = {"nf4": Format(4, 64), "int8": Format(8, 256), "fp8": Format(8, 256)}
"""By the names of `model.quantization`. nf4: quantiles of a normal distribution. int8: whole numbers up to 127, as
shares of the scale. fp8: E4M3 (Micikevicius et al. 2022, arXiv 2209.05433), whose largest number is the scale."""

PIECE = 2**17
"""Weights that are rounded at once, a multiple of every block."""


def quantize(main: nn.Module, blocks: Iterable[str], kind: str, dtype: torch.dtype) -> None:
    """Replace the frozen linear layers in the blocks, adapters' base layers among them.

    Nothing is read or rounded before the new layers are placed: see `gtl.train.place`.

    Args:
        main: Changes in place. Its weights may be of any floating-point dtype.
        blocks: Names of submodules; what is outside of them stays as it is.
        kind: One of `FORMATS`.
        dtype: Of the arithmetic, where autocast does not decide it.

    Raises:
        UserError: bitsandbytes isn't installed.
    """
    check_library(kind)
    for name in [name for name, _ in frozen_linears(main, blocks)]:
        main.set_submodule(name, QuantizedLinear(cast(nn.Linear, main.get_submodule(name)), kind, dtype))


def frozen_linears(main: nn.Module, blocks: Iterable[str]) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers in the blocks whose weights do not move, with their names."""
    for block in blocks:
        for name, layer in main.get_submodule(block).named_modules(prefix=block):
            # No subclass: those of torch and others are not called, but read by the module that they are in.
            if type(layer) is nn.Linear and not layer.weight.requires_grad:
                yield name, layer


class QuantizedLinear(nn.Module):
    """A frozen linear layer of a few bits a weight. Its gradient is that of a layer with the weight it stands for."""

    def __init__(self, layer: nn.Linear, kind: str, dtype: torch.dtype) -> None:
        """Takes over the bias; the weight is rounded to the nearest that the format has, when the codes are placed."""
        super().__init__()
        self.kind, self.dtype = kind, dtype
        self.in_features, self.out_features = layer.in_features, layer.out_features
        made: list[Tensor] = []

        def make_codes(device: torch.device | str, weight: Tensor = layer.weight) -> Tensor:
            codes, scales = encode(weight.detach(), kind, device)
            # As bytes, so that nothing that casts a model's floating-point parameters rounds them.
            made.append(scales.view(torch.uint8))
            return codes

        size = FORMATS[kind]
        self.codes = promise(size.code_bytes(layer.weight.numel()), make_codes)
        self.scales = promise(size.scale_bytes(layer.weight.numel()), lambda device: made.pop().to(device))
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        """What the codes stand for; DoRA reads it."""
        return decode(self.codes, self.scales, self.kind, (self.out_features, self.in_features), self.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """The layer's output, in autocast's dtype or the input's."""
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        shape = (self.out_features, self.in_features)
        return cast(Tensor, Multiply.apply(hidden, self.codes, self.scales, self.bias, self.kind, shape))

    def extra_repr(self) -> str:
        """What `print` says."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.kind}"


class Multiply(torch.autograd.Function):
    """x W^T + b, which keeps the codes for the backward pass: autograd would keep W."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, kind: str, shape: tuple[int, int]
    ) -> Tensor:
        """The product, in the input's dtype."""
        ctx.save_for_backward(codes, scales)
        ctx.kind, ctx.shape = kind, shape
        bias = None if bias is None else bias.to(hidden.dtype)
        return F.linear(hidden, decode(codes, scales, kind, shape, hidden.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the input; nothing else moves."""
        (gradient,) = gradients
        codes, scales = ctx.saved_tensors
        return gradient @ decode(codes, scales, ctx.kind, ctx.shape, gradient.dtype), None, None, None, None, None


def check_library(kind: str) -> None:
    """Refuse what this installation cannot do.

    Raises:
        UserError: bitsandbytes isn't installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError(
            f"model.quantization: {kind!r} needs bitsandbytes, which is not installed: pip install 'gtl[quantized]', "
            "or set it to null"
        ) from None


def encode(weight: Tensor, kind: str, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Codes (uint8; two to a byte in 4 bits) and scales (fp32) of a weight, on a device.

    Made of a piece at a time, since on CPUs bitsandbytes takes five times what it is given.
    """
    from bitsandbytes import functional

    flat, block = weight.reshape(-1), FORMATS[kind].block
    made: list[tuple[Tensor, Tensor]] = []
    for piece in flat.split(PIECE):
        piece = piece.to(device)
        if kind == "nf4":
            codes, state = functional.quantize_4bit(piece, blocksize=block, quant_type=kind)
        else:
            codes, state = functional.quantize_blockwise(piece, code=codebook(kind, piece.device), blocksize=block)
        made.append((codes.flatten(), state.absmax))
    codes, scales = map(torch.cat, zip(*made, strict=True))
    return codes, scales


def decode(codes: Tensor, scales: Tensor, kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight that codes and scales (as bytes) stand for."""
    from bitsandbytes import functional

    absmax, block = scales.view(torch.float32), FORMATS[kind].block
    if kind == "nf4":
        # Flat and of an even number: for odd rows bitsandbytes compiles a kernel on CPUs, which takes seconds.
        state = functional.QuantState(absmax, torch.Size([2 * codes.numel()]), None, block, kind, dtype)
        return functional.dequantize_4bit(codes, state).flatten()[: math.prod(shape)].view(shape)
    state = functional.QuantState(absmax, code=codebook(kind, codes.device), blocksize=block, dtype=dtype)
    return functional.dequantize_blockwise(codes, state).view(shape)


@functools.cache
def codebook(kind: str, device: torch.device) -> Tensor:
    """The 256 numbers of an 8-bit format in order, as shares of the largest; zero is among them more than once."""
    if kind == "int8":
        magnitudes = torch.arange(128, device=device) / 127
    else:  # of its 128 codes without a sign the last is no number
        finite = torch.arange(127, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()
        magnitudes = F.pad(finite / finite[-1], (1, 0))
    return torch.cat([-magnitudes.flip(0), magnitudes])
