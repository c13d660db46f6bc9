"""How long a step takes, by a model on paper: arithmetic, the optimizer, and what is sent and not hidden.

    step    = max(forward, sent beside it) + max(backward, sent beside it) + sent alone + optimizer
    forward = micro-batches x images of one x operations of an image / (peak x utilisation); backward likewise

`gtl.train.work` counts the operations, recomputation with the backward pass; `gtl.train.traffic` has what is sent.
Where nothing overlaps, on CPUs, sums take the place of the maxima. The optimizer reads and writes its state once, at
the rate of the device's memory. Fillers of an uneven batch are computed and do not count as images. What a forward and
backward pass takes however few images go through it has to be told (`Rates.launch`): nothing on paper says it, and
without it the model is too fast for small models with few images a worker (gtl/bench/RESULTS.md). Loading of data,
looks, checkpoints and the start are not in it, nor waiting for a worker that is late.
`gtl bench train --workers 1 --workers 2 --predict` measures that part, and puts the model beside the clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gtl.train.traffic import Layout, Links, traffic

if TYPE_CHECKING:
    from gtl.config.recipe import Train
    from gtl.train.footprint import Footprint

STEPPED = {"adamw": 28, "adamw_8bit": 16}
"""Optimizer -> bytes that a trained weight's step moves: weight, gradient and two moments are read, all but the
gradient are written."""
AVERAGED = 12
"""The same of train.ema: weight and average are read, the average is written."""


@dataclass(frozen=True)
class Rates:
    """What the hardware attains."""

    flops: float
    """Operations a second of a worker."""
    memory: float
    """Bytes a second between a worker and its device's memory."""
    links: Links
    overlap: bool
    """Whether what is sent beside arithmetic costs no time until it takes longer."""
    launch: float = 0.0
    """Seconds of a forward and backward pass that no image adds: launching, hooks, and a step's own part of it."""


@dataclass(frozen=True)
class Pace:
    """A step under one ZeRO stage on some workers. Seconds, if nothing else is said."""

    stage: int
    layout: Layout
    micro_batch: int
    accumulation: int
    batch_size: int
    compute: float
    """Forward and backward, with what no image adds."""
    optimizer: float
    sent: float
    """Of collective calls, hidden or not."""
    waited: float
    """Of these, what is not hidden."""

    @property
    def step(self) -> float:
        """Of the whole step."""
        return self.compute + self.optimizer + self.waited

    @property
    def communication(self) -> float:
        """Share of the step that passes waiting for collective calls."""
        return self.waited / self.step

    @property
    def most(self) -> float:
        """That share if nothing were hidden."""
        return self.sent / (self.compute + self.optimizer + self.sent)

    @property
    def images_per_second(self) -> float:
        """Of all workers."""
        return self.batch_size / self.step

    def device_hours(self, images: float) -> float:
        """That so many images take."""
        return self.layout.workers * images / self.images_per_second / 3600


def pace(
    footprint: Footprint, train: Train, layout: Layout, rates: Rates, *, stage: int, micro_batch: int, accumulation: int
) -> Pace:
    """Work out a step.

    Args:
        footprint: What the model takes.
        train: The recipe's section.
        layout: Of the workers.
        rates: Of each of them.
        stage: Of ZeRO.
        micro_batch: Images of a forward pass of one worker.
        accumulation: Forward passes of one worker.
    """
    images, work = micro_batch * accumulation, footprint.work
    forward = images * work.forward / rates.flops
    backward = images * work.of_image(train.activation_checkpointing) / rates.flops - forward
    moved = STEPPED[train.optimizer.type] + (AVERAGED if train.ema else 0)
    optimizer = moved * footprint.trained / (layout.workers if stage else 1) / rates.memory
    sent = traffic(
        footprint, layout, rates.links, stage=stage, accumulation=accumulation, hpz=train.zero.hpz,
        checkpointing=train.activation_checkpointing,
    )  # fmt: skip
    waited = sent.total
    if rates.overlap:
        waited = max(0.0, sent.forward - forward) + max(0.0, sent.backward - backward) + sent.alone
    compute = forward + backward + accumulation * rates.launch
    return Pace(stage, layout, micro_batch, accumulation, train.batch_size, compute, optimizer, sent.total, waited)
