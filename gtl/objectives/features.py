"""What a model puts out on the way: of some of its modules, as they run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm


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


def pooled(outputs: Sequence[Tensor]) -> Tensor:
    """What one module put out as a vector a sample, [B, D] in fp32: the mean over places, text's among them.

    Channels have zero mean and unit variance, so that a weight or a scale means the same for every model.

    Args:
        outputs: [B, D, h, w] or [B, tokens, D].
    """
    rows = torch.cat([(each.flatten(2).mT if each.dim() == 4 else each).float() for each in outputs], 1)
    mean = rows.mean(1)
    return layer_norm(mean, mean.shape[1:])
