"""What a recipe leaves to `auto`, settled by arithmetic: steps, ZeRO stage, micro-batch and accumulation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gtl.config import Recipe
from gtl.types import UserError

if TYPE_CHECKING:
    from gtl.train.footprint import Footprint

CPU_MICRO_BATCH = 4
GPU_MICRO_BATCH = 32
"""Beyond it nothing gets faster."""
STAGES = (0, 1, 2, 3)
BUCKET = 50_000_000
"""Elements of the buffer through which gradients are reduced, at most."""
REUSE = 100_000_000
"""Elements that a worker keeps gathered at stage 3, at most, for what needs them soon."""
USABLE = 0.9
"""Share of a device's memory that a plan may fill. The rest is for the backward pass's own tensors, for what the
libraries take, and for gaps."""


@dataclass(frozen=True)
class Need:
    """Bytes of one worker, on its device if nothing else is said."""

    weights: float
    """Frozen and trained ones, with the fp32 masters of the trained ones where ZeRO keeps them apart, and the EMA."""
    gradients: float
    """Of the trained weights."""
    optimizer: float
    """AdamW's two moments."""
    buffers: float
    """Through which gradients are reduced, the largest block's weights where they are gathered for its turn, and the
    largest quantised weight as it is multiplied with."""
    activations: float
    host: float = 0.0
    """In the machine's memory, with train.zero.offload: cpu."""
    disk: float = 0.0
    """On the machine's disk, with train.zero.offload: nvme."""

    @property
    def total(self) -> float:
        """The sum of what is on the device."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations


@dataclass(frozen=True)
class Memory:
    """What has to fit on a device, and the device."""

    footprint: Footprint
    device_bytes: float
    """Of the smallest device."""

    @property
    def budget(self) -> float:
        """Bytes that a plan may fill."""
        return USABLE * self.device_bytes


@dataclass(frozen=True)
class TrainPlan:
    """How a run goes through its steps."""

    steps: int
    stage: int
    micro_batch: int
    """Images per forward pass of one worker."""
    accumulation: int
    """Forward passes of one worker per step."""


def need(
    footprint: Footprint, recipe: Recipe, *, stage: int, workers: int, micro_batch: int, offload: bool = False
) -> Need:
    """What one of the workers holds under a ZeRO stage.

    Stage 1 shards the optimizer, 2 also the gradients, 3 also the weights (arXiv 1910.02054, figure 1). From stage 1
    on every worker has fp32 masters of its share beside the weights that the forward pass reads. With `offload` the
    masters, the optimizer and two copies of the share's gradient are in the machine's memory, and at stage 3 all that
    is sharded (arXiv 2101.06840); under train.zero.offload: nvme they are on its disk. train.zero.hpz keeps the weights
    a second time, in larger shares.
    """
    train, trained = recipe.train, footprint.trained
    weights_share, gradients_share, share = (1 / workers if stage >= first else 1.0 for first in (3, 2, 1))
    averaged = 4 if train.ema else 0
    masters = 4 if stage else 0
    moments = 2 if train.optimizer.type == "adamw_8bit" else 8
    weights = (footprint.frozen_bytes + 4 * trained) * weights_share
    stepped, moved = trained * (masters + averaged) * share, moments * trained * share
    gradients = 4 * trained * gradients_share
    buffer = 4 * min(trained, BUCKET) if stage else 0
    if stage == 3 and train.zero.hpz > 1:
        weights += (footprint.frozen_bytes + 4 * trained) / train.zero.hpz
    moved_out = 0.0
    if offload:
        moved_out = stepped + moved + 2 * 4 * trained * share + (weights if stage == 3 else 0)
        weights, gradients = (0.0, 0.0) if stage == 3 else (weights, gradients)
        stepped, moved = 0.0, 0.0
    return Need(
        weights=weights + stepped,
        gradients=gradients,
        optimizer=moved,
        buffers=buffer + footprint.decoded_bytes + (footprint.largest_bytes if stage == 3 else 0),
        activations=footprint.activations(micro_batch, train.activation_checkpointing),
        host=0.0 if train.zero.offload == "nvme" else moved_out,
        disk=moved_out if train.zero.offload == "nvme" else 0.0,
    )


def steps_of(recipe: Recipe, steps_per_epoch: int) -> int:
    """Optimizer steps of a run whose epochs have so many."""
    return recipe.train.steps or steps_per_epoch * (recipe.train.epochs or 1)


def choose(recipe: Recipe, *, workers: int, steps_per_epoch: int, memory: Memory | None = None) -> TrainPlan:
    """Settle a recipe for a number of workers. `memory` is None on CPUs, where nothing is sharded unless asked for.

    Raises:
        UserError: the model fits on no device, however it is sharded, or not with the fewest of elastic workers.
    """
    train = recipe.train
    fewest = train.workers[0] if isinstance(train.workers, tuple) else workers
    if fewest < workers:  # found when machines go, it would end a run that was to go on
        settle_sizes(recipe, fewest, math.ceil(train.batch_size / fewest), memory)
    share = math.ceil(train.batch_size / workers)
    stage, micro_batch = settle_sizes(recipe, workers, share, memory)
    return TrainPlan(
        steps=steps_of(recipe, steps_per_epoch),
        stage=stage,
        micro_batch=micro_batch,
        accumulation=math.ceil(share / micro_batch),
    )


def settle_sizes(recipe: Recipe, workers: int, share: int, memory: Memory | None) -> tuple[int, int]:
    """The ZeRO stage and the micro-batch: the first stage that fits, since every further one costs communication, and
    in it the largest micro-batch that does.

    Raises:
        UserError: nothing fits.
    """
    asked_stage, asked = recipe.train.zero.stage, recipe.train.micro_batch
    offload = recipe.train.zero.offload != "none"
    sizes = micro_batches(share, CPU_MICRO_BATCH if memory is None else GPU_MICRO_BATCH) if asked == "auto" else [
        min(asked, share)
    ]  # fmt: skip
    bearable = STAGES[1 if offload else 0 : recipe.max_zero_stage + 1]
    stages = bearable if asked_stage == "auto" else [asked_stage]
    if memory is None:
        return stages[0], sizes[0]

    def needed(stage: int, size: int) -> Need:
        return need(memory.footprint, recipe, stage=stage, workers=workers, micro_batch=size, offload=offload)

    for stage in stages:
        for size in sizes:
            if needed(stage, size).total <= memory.budget:
                return stage, size
    if asked_stage != "auto":  # the user's own word, and an estimate is no reason to refuse it
        return asked_stage, sizes[-1]
    stage = min(stages, key=lambda stage: needed(stage, sizes[-1]).total)  # a single worker's is the first
    least = needed(stage, sizes[-1])
    more = "" if recipe.train.activation_checkpointing else "train.activation_checkpointing: true, "
    more += "" if offload else "train.zero.offload: cpu, "
    raise UserError(
        f"train.zero.stage: auto: at stage {stage} and micro-batch {sizes[-1]} each of {workers} workers needs "
        f"{least.total / 2**30:.1f} GiB, of which activations are {least.activations / 2**30:.1f} GiB; "
        f"{memory.budget / 2**30:.1f} GiB of a device are for them; take {more}more workers or a smaller model"
    )


def micro_batches(share: int, largest: int) -> list[int]:
    """Sizes that go through a worker's share in 1, 2, 3, ... passes, from at most `largest` down to 1.

    Each is the smallest that makes no more passes: a larger one would only fill more places.
    """
    fewest = math.ceil(share / largest)
    return list(dict.fromkeys(math.ceil(share / passes) for passes in range(fewest, share + 1)))


def check_groups(hpz: int, workers: int | tuple[int, int]) -> None:
    """Refuse numbers of workers that are not made of whole groups of train.zero.hpz.

    Raises:
        UserError: there is one.
    """
    counts = range(workers[0], workers[1] + 1) if isinstance(workers, tuple) else [workers]
    if odd := [count for count in counts if count % hpz]:
        raise UserError(f"train.zero.hpz: {hpz}: has to divide the number of workers, which can be {odd[0]}")


def repeats_of(number: int) -> str:
    """So many places of a batch that no image of it takes, for people to read."""
    return "1 repeat that does not count" if number == 1 else f"{number} repeats that do not count"
