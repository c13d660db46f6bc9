"""What a model puts out on the way: of some of its modules, as they run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

HIDDEN = 128
"""Width of a head."""


@contextmanager
def recorded(model: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """Within it what some of a model's modules put out, in execution order; text that runs along is part of it."""
    found: list[Tensor] = []

    def take(module: nn.Module, inputs: Any, output: Any) -> None:
        found.extend(value for value in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(value))

    hooks = [model.get_submodule(name).register_forward_hook(take) for name in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def recorded_each(model: nn.Module, names: Sequence[str]) -> Iterator[list[list[Tensor]]]:
    """`recorded`, of every module by itself, in the order of their names."""
    with ExitStack() as stack:
        yield [stack.enter_context(recorded(model, (name,))) for name in names]


def pooled(outputs: Sequence[Tensor]) -> Tensor:
    """What one module put out as a vector a sample, [B, D] in fp32: the mean over places, text's among them.

    Channels have zero mean and unit variance, so that a weight or a scale means the same for every model.

    Args:
        outputs: [B, D, h, w] or [B, tokens, D].
    """
    mean = rows_of(outputs).mean(1)
    return layer_norm(mean, mean.shape[1:])


def placed(outputs: Sequence[Tensor]) -> Tensor:
    """What one module put out at every place by itself, [B, places, D] in fp32, scaled as in `pooled`."""
    rows = rows_of(outputs)
    return layer_norm(rows, rows.shape[2:])


def rows_of(outputs: Sequence[Tensor]) -> Tensor:
    """What one module put out, see `pooled`, as [B, places, D] in fp32."""
    return torch.cat([(each.flatten(2).mT if each.dim() == 4 else each).float() for each in outputs], 1)


class Heads(nn.Module):
    """Features of several modules, as of `placed`, to logits [B, places] of each, above 0 for places of real pictures.

    The features see far; a head sees its own place.
    """

    def __init__(self, widths: Sequence[int], seed: int = 0) -> None:
        """Weights are drawn by the seed; all places look alike at first."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.heads = nn.ModuleList(
                nn.Sequential(nn.Linear(width, HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, 1)) for width in widths
            )
        for head in self.heads:
            nn.init.zeros_(head.get_parameter("2.weight"))

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        return tuple(head(each).squeeze(2) for head, each in zip(self.heads, features, strict=True))
