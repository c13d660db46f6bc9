"""What a recipe leaves to `auto`, settled by arithmetic: steps, ZeRO stage, micro-batch and accumulation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gtl.config import Recipe
from gtl.types import UserError

CPU_MICRO_BATCH = 4
GPU_MICRO_BATCH = 8
TRAINABLE_BYTES = 16
"""Of one trained parameter in fp32: weight 4, gradient 4, AdamW's two moments 8."""
STAGES: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
WEIGHTS_SHARE = 0.6
"""Share of a device's memory that weights and optimizer may take; the rest is for activations."""


@dataclass(frozen=True)
class Memory:
    """What has to fit on a device, and the device."""

    frozen_bytes: int
    """Weights that do not move."""
    trainable: int
    """Number of parameters that do."""
    device_bytes: int

    def needed(self, stage: int, workers: int) -> float:
        """Bytes of weights, gradients and optimizer on one of the workers, without activations.

        Stage 1 shards the optimizer, 2 also the gradients, 3 also the weights (arXiv 1910.02054, figure 1).
        """
        sharded = {0: 0, 1: 8, 2: 12, 3: 16}[stage]
        whole = TRAINABLE_BYTES - sharded
        frozen = self.frozen_bytes / workers if stage == 3 else self.frozen_bytes
        return frozen + self.trainable * (whole + sharded / workers)


@dataclass(frozen=True)
class TrainPlan:
    """How a run goes through its steps."""

    steps: int
    stage: int
    micro_batch: int
    """Images per forward pass of one worker."""
    accumulation: int
    """Forward passes of one worker per step."""


def choose(recipe: Recipe, *, workers: int, steps_per_epoch: int, memory: Memory | None = None) -> TrainPlan:
    """Settle a recipe for a number of workers. `memory` is None on CPUs, where nothing is sharded unless asked for.

    Raises:
        UserError: the model fits on no device, however it is sharded.
    """
    train = recipe.train
    stage = train.zero.stage
    if stage == "auto":
        stage = choose_stage(memory, workers, recipe.pair.max_zero_stage)
    share = math.ceil(train.batch_size / workers)
    if train.micro_batch == "auto":
        # The smallest that makes no more passes than the largest would: fewer places are only filled.
        passes = math.ceil(share / (CPU_MICRO_BATCH if memory is None else GPU_MICRO_BATCH))
        micro_batch = math.ceil(share / passes)
    else:
        micro_batch = min(train.micro_batch, share)
    return TrainPlan(
        steps=train.steps or steps_per_epoch * (train.epochs or 1),
        stage=stage,
        micro_batch=micro_batch,
        accumulation=math.ceil(share / micro_batch),
    )


def choose_stage(memory: Memory | None, workers: int, max_stage: int) -> Literal[0, 1, 2, 3]:
    """The first ZeRO stage that fits, since every further one costs communication.

    Raises:
        UserError: none does.
    """
    if memory is None:
        return 0
    budget = WEIGHTS_SHARE * memory.device_bytes
    for stage in STAGES[: max_stage + 1]:
        if memory.needed(stage, workers) <= budget:
            return stage
    needed = memory.needed(max_stage, workers)
    raise UserError(
        f"train.zero.stage: auto: weights and optimizer need {needed / 2**30:.1f} GiB on each of {workers} workers, "
        f"{budget / 2**30:.1f} GiB of a device are for them; take more workers or a smaller model"
    )
