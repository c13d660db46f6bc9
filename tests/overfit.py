"""Learning one batch by heart."""

from collections.abc import Iterable

import torch
from torch import nn

from gtl.types import Batch


def overfit(
    player: nn.Module, parameters: Iterable[nn.Parameter], batch: Batch, steps: int, rate: float = 1e-2
) -> list[float]:
    """Losses of some steps on one batch."""
    # So few steps need a short memory of the squares: those of the first steps are the largest.
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0, fused=True)
    losses = []
    for _ in range(steps):
        total = player(batch).total
        losses.append(float(total.detach()))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return losses
