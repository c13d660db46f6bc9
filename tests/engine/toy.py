"""A small player with odd shapes, global batches cut for any number of ranks, and a plain torch reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gtl.config.recipe import Train
from gtl.train.engine import Engine
from gtl.train.schedule import learning_rate
from gtl.types import Batch, Losses

SAMPLES = 5
"""Of a global batch: odd, so that two ranks get uneven slices."""


class Toy(nn.Module):
    """Frozen linear, then trained convolution, linear and a bare parameter, none with a round number of elements."""

    def __init__(self, frozen: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.base = nn.Linear(6, 6).to(frozen)
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.head = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.empty(7))
        self.dropout = nn.Dropout(0.0)
        self.base.requires_grad_(False)
        self.low = frozen != torch.float32
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def trained(self) -> dict[str, nn.Parameter]:
        """What moves."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def forward(self, batch: Batch) -> Losses:
        """Weighted squared error; under bf16 autocast when the frozen part is bf16."""
        images, target = batch.tensors["images"], batch.tensors["target"]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            hidden = self.base(images)
            assert not self.low or hidden.dtype == torch.bfloat16
            hidden = self.dropout(torch.tanh(self.conv(hidden)))
            out = self.head(hidden).mean((1, 2)) * self.scale.sum()
        error = (out.float() - target).square().mean(1)
        total = (batch.weight * error).sum()
        return Losses(total, {"error": total.detach()})


def sample(index: int) -> tuple[Tensor, Tensor]:
    """One image [3, 6, 6] and its target [3]."""
    generator = torch.Generator().manual_seed(1000 + index)
    return torch.randn(3, 6, 6, generator=generator), torch.randn(3, generator=generator)


def global_batch(step: int) -> list[tuple[Tensor, Tensor, float]]:
    """Samples of a step with their weights, which sum to 1."""
    return [(*sample(step * SAMPLES + index), 1 / SAMPLES) for index in range(SAMPLES)]


def micro_batches(step: int, accumulation: int, rank: int, world: int) -> list[Batch]:
    """This rank's share of a step, filled up with repeats of weight 0."""
    whole = global_batch(step)
    places = world * accumulation
    size = -(-len(whole) // places)
    whole += [(*whole[0][:2], 0.0)] * (size * places - len(whole))
    mine = whole[rank * size * accumulation : (rank + 1) * size * accumulation]
    return [collate(mine[start : start + size]) for start in range(0, len(mine), size)]


def collate(samples: list[tuple[Tensor, Tensor, float]]) -> Batch:
    """Stack samples."""
    images, target, weight = zip(*samples, strict=True)
    return Batch({"images": torch.stack(images), "target": torch.stack(target)}, torch.tensor(weight))


def batches(start: int, stop: int, accumulation: int = 1) -> Iterator[tuple[int, list[Batch]]]:
    """What the loop iterates over, for the rank that calls it."""
    for step in range(start, stop):
        yield step, micro_batches(step, accumulation, dist.get_rank(), dist.get_world_size())


def make_train(**values: Any) -> Train:
    """Settings that make every step count: clipping bites, the rate moves."""
    return Train.model_validate(
        {"learning_rate": 1e-2, "max_grad_norm": 0.5, "schedule": {"type": "cosine", "warmup": 3}, **values}
    )


def make_engine(player: Toy, train: Train, stage: int, accumulation: int = 1, total_steps: int = 20) -> Engine:
    """An engine on the CPU."""
    return Engine(
        player, player.trained(), train, stage=stage, micro_batch=SAMPLES, accumulation=accumulation, device="cpu",
        total_steps=total_steps,
    )  # fmt: skip


def descend(engine: Engine, steps: Iterable[Sequence[Batch]]) -> list[tuple[float, float]]:
    """Losses of all ranks together, and gradient norms, of steps that are given as this rank's micro-batches."""
    found = []
    for micro_batches in steps:
        total = torch.zeros(())
        for batch in micro_batches:
            share = engine(batch).total
            engine.backward(share)
            total += share.detach()
        engine.step()
        dist.all_reduce(total)
        found.append((total.item(), engine.grad_norm))
    return found


def plain_series(train: Train, steps: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms and final weights of a bare torch loop over whole global batches."""
    player = Toy()
    optimizer = torch.optim.AdamW(
        player.trained().values(), betas=train.optimizer.betas, eps=train.optimizer.eps,
        weight_decay=train.optimizer.weight_decay,
    )  # fmt: skip
    losses, norms = [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train.schedule, train.learning_rate, step, steps)
        total = player(collate(global_batch(step))).total
        optimizer.zero_grad()
        total.backward()
        norms.append(float(nn.utils.clip_grad_norm_(player.trained().values(), train.max_grad_norm or float("inf"))))
        optimizer.step()
        losses.append(total.item())
    return losses, norms, {name: value.detach().clone() for name, value in player.trained().items()}
