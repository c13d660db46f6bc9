"""Layers that add another low-rank update to every row of a batch, and how a batch's rows meet the slots.

A slot is one place of stacked matrices: A [slots, rank, in, ...] and B [slots, rank, out]. What is narrower than the
rank is padded with zeros, which add nothing and get gradients of exactly zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Way(NamedTuple):
    """How a batch is computed: as runs of equal length, each with a slot and a scale of its own."""

    each: int | None
    """Rows of a run: the more, the larger the matrix products and the fewer. None: one run has all."""
    first: int | None
    """The first run's slot, where the runs take consecutive slots: their weights are read where they lie. None: they
    are gathered."""


def way_of(slots: Sequence[int], scales: Sequence[float]) -> Way:
    """The cheapest way to compute a batch whose rows take these slots at these scales."""
    runs = [len(list(run)) for _, run in itertools.groupby(zip(slots, scales, strict=True))]
    each = math.gcd(*runs)
    heads = list(slots[::each])
    consecutive = heads == list(range(heads[0], heads[0] + len(heads)))
    return Way(each, heads[0] if consecutive else None)


@dataclass
class Rows:
    """What every layer reads of the batch in work; set once a forward pass."""

    trained: bool = False
    """Whether there are backward passes; the same for all batches, so that all are rounded alike."""
    each: int | None = 0
    """Rows of a run; 0 while nothing is assigned, None where one run has as many as come."""
    index: Tensor = torch.empty(0, dtype=torch.long)
    """Each run's slot, [runs]."""
    gathered: bool = True
    scale: Tensor | None = None
    """Each run's scale, [runs]; None: all are 1."""


class SlotLayer(nn.Module):
    """A frozen layer, and updates of which every row of the batch takes one: y = base(x) + scale * B A x."""

    def __init__(self, name: str, base_layer: nn.Linear | nn.Conv2d, rows: Rows) -> None:
        """`rows` is shared by all layers of a model."""
        super().__init__()
        self.name = name
        self.base_layer = base_layer
        self.rows = rows
        self.a: Tensor | None = None
        """[slots, rank, in] or [slots, rank, in, height, width]; None: no row has an update here."""
        self.b: Tensor | None = None
        """[slots, rank, out]."""

    @property
    def weight(self) -> Tensor:
        """The base layer's, whose dtype models look at."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, ...].

        Raises:
            ValueError: the first dimension is not the batch that was assigned.
        """
        rows = self.rows
        if rows.each is not None and x.shape[0] != len(rows.index) * rows.each:
            raise ValueError(
                f"{self.name}: {x.shape[0]} rows came, {len(rows.index) * rows.each} are assigned; a layer whose first "
                "dimension is not the batch cannot have slots"
            )
        if self.a is None or self.b is None:
            y: Tensor = self.base_layer(x)
            return y
        a, b = self.a, self.b
        if rows.gathered:
            a, b = a.index_select(0, rows.index), b.index_select(0, rows.index)
        if rows.scale is not None:
            b = b * rows.scale.to(b.dtype)[:, None, None]
        return self.adapted(x, a, b)

    def adapted(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The output for weights of each run, a [runs, rank, in, ...] and b [runs, rank, out]."""
        raise NotImplementedError


class SlotLinear(SlotLayer):
    """A linear layer; x [batch, ..., in]."""

    def adapted(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The rows of a run are one matrix."""
        tokens = x.reshape(len(a), -1, x.shape[-1])
        y = self.base_layer(tokens)
        down = torch.bmm(tokens.to(y.dtype), a.to(y.dtype).transpose(1, 2))
        return add_product(y, down, b.to(y.dtype)).view(*x.shape[:-1], -1)


class SlotConv(SlotLayer):
    """A convolution without groups; x [batch, in, height, width]."""

    base_layer: nn.Conv2d

    def adapted(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """One grouped convolution, of a run's channels a group."""
        layer, each = self.base_layer, len(x) // len(a)
        y = layer(x)
        x, a, b = x.to(y.dtype), a.to(y.dtype), spread(b.to(y.dtype), each)
        if is_pointwise(layer):
            down = torch.bmm(spread(a, each).flatten(2), x.flatten(2))
        else:
            if self.rows.trained:
                a, each = spread(a, each), 1  # slower, but the backward pass keeps x itself and no other copy of it
            # Without the layer's dilation, as in PEFT.
            wide, kernels = turned(x, len(a), each).flatten(1, 2), a.flatten(0, 1)
            down = F.conv2d(wide, kernels, None, layer.stride, layer.padding, groups=len(a))
            down = turned(down.unflatten(1, (len(a), -1)).flatten(0, 1), each, len(a)).flatten(0, 1).flatten(2)
        return add_product(y.flatten(2), b.transpose(1, 2), down).view(y.shape)


def is_pointwise(layer: nn.Conv2d) -> bool:
    """Whether a convolution is a linear layer over pixels."""
    return layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding in ((0, 0), "valid")


def turned(x: Tensor, first: int, second: int) -> Tensor:
    """[first * second, ...] as [second, first, ...]."""
    return x.unflatten(0, (first, second)).transpose(0, 1)


def spread(x: Tensor, each: int) -> Tensor:
    """Every row so many times."""
    return x.repeat_interleave(each, 0) if each > 1 else x


def add_product(y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """y + left @ right, batched, in one pass over y; where no gradient is wanted, in its memory."""
    # Autograd turns a change of a view in place into two more copies of its gradient.
    return torch.baddbmm(y, left, right) if torch.is_grad_enabled() else y.baddbmm_(left, right)
