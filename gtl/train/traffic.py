"""What workers send each other in a step, by ZeRO stage, and how long that takes.

A collective call goes through a message of M bytes, all of which every worker has in the end (all-gather) or had in the
beginning (reduce-scatter); an all-reduce is one after the other. On a ring of N each sends (N-1)/N M for either
(Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"), so 2 (N-1)/N M for an
all-reduce. Machines are a second level (Cho et al. 2019, "BlueConnect"): of n machines with g workers each,

    seconds = latency + (g-1)/g M / inner + (n-1)/n M / outer

where `inner` is what a worker sends within its machine and `outer` what a machine sends to others, bytes a second. One
machine is the plain ring; so are machines with a worker each.

The messages, with T trained weights (fp32: 4 T bytes) and W bytes of all weights, are those of Rajbhandari et al. 2020
(arXiv 1910.02054, section 7) as DeepSpeed sends them. A LoRA's T is its adapters; only stage 3 sends what is frozen.

    stage 0  all-reduce of 4 T, once a step, behind the last backward pass
    stage 1  all-reduce of 4 T beside the last backward pass, all-gather of 4 T behind the optimizer
    stage 2  the same, the all-reduce beside the backward pass of every micro-batch
    stage 3  every micro-batch: all-gather of W beside the forward pass; all-gather of W and reduce-scatter of 4 T
             beside the backward pass

The paper has a reduce-scatter in stages 1 and 2, half as much: DeepSpeed reduces whole buckets there
(`use_multi_rank_bucket_allreduce`), and so 3 instead of 2 of 4 T a step. What the backward pass does not reach is not
gathered for it. With train.zero.hpz it gathers in groups of so many workers (arXiv 2306.10209, section 3.2). With
activation checkpointing a block is gathered once more if it has more weights than DeepSpeed keeps between two uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gtl.train.plan import BUCKET, REUSE

if TYPE_CHECKING:
    from gtl.train.footprint import Footprint

FALLBACK = 500_000_000
"""Elements of a message at stage 0 (DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE)."""


@dataclass(frozen=True)
class Links:
    """How fast workers reach each other."""

    inner: float
    """Bytes a second that a worker sends to others of its machine."""
    outer: float
    """Bytes a second that a machine sends to others; of all its workers."""
    latency: float
    """Seconds that a call takes however little it sends."""


@dataclass(frozen=True)
class Layout:
    """Workers on machines that are alike."""

    nodes: int
    workers: int
    """Of all machines."""

    @property
    def devices(self) -> float:
        """Workers of a machine; on average, where they are not shared out evenly."""
        return self.workers / self.nodes

    def group(self, size: int) -> Layout:
        """So many workers in a row."""
        return Layout(math.ceil(size / self.devices), size)


@dataclass(frozen=True)
class Traffic:
    """Seconds of collective calls in one step."""

    forward: float = 0.0
    """Beside the forward passes."""
    backward: float = 0.0
    """Beside the backward passes."""
    alone: float = 0.0
    """While nothing else is done."""

    @property
    def total(self) -> float:
        """Of all of them."""
        return self.forward + self.backward + self.alone


def gather(nbytes: float, layout: Layout, links: Links, calls: int = 1) -> float:
    """Seconds of an all-gather or a reduce-scatter of so many bytes in so many calls; 0 for a single worker."""
    if layout.workers == 1:
        return 0.0
    within = (layout.devices - 1) / layout.devices * nbytes / links.inner
    between = (layout.nodes - 1) / layout.nodes * nbytes / links.outer
    return calls * links.latency + within + between


def all_reduce(nbytes: float, layout: Layout, links: Links, calls: int = 1) -> float:
    """Seconds of an all-reduce, which is a reduce-scatter and an all-gather in one call."""
    return 2 * gather(nbytes, layout, links, calls) - gather(0.0, layout, links, calls)


def traffic(
    footprint: Footprint, layout: Layout, links: Links, *, stage: int, accumulation: int, hpz: int = 1,
    checkpointing: bool = False,
) -> Traffic:  # fmt: skip
    """What a step takes.

    Args:
        footprint: Sizes of the weights.
        layout: Of the workers.
        links: Between them.
        stage: Of ZeRO.
        accumulation: Micro-batches of a step.
        hpz: Workers that hold all weights a second time; 1: none do.
        checkpointing: Whether blocks run forward again.
    """
    trained, gradients = footprint.trained, 4.0 * footprint.trained
    if stage == 0:
        return Traffic(alone=all_reduce(gradients, layout, links, math.ceil(trained / FALLBACK)))
    buckets = math.ceil(trained / BUCKET)
    if stage < 3:
        reduced = all_reduce(gradients, layout, links, buckets)
        return Traffic(0.0, reduced * (accumulation if stage == 2 else 1), gather(gradients, layout, links, buckets))
    weights = footprint.frozen_bytes + gradients
    near = layout if hpz == 1 else layout.group(hpz)
    unreached = sum(block.nbytes for block in footprint.blocks if block.name in footprint.work.unreached)
    again = sum(block.nbytes for block in footprint.blocks if checkpointing and block.parameters > REUSE)
    modules = footprint.modules
    back = gather(weights - unreached + again, near, links, modules) + gather(gradients, layout, links, buckets)
    return Traffic(accumulation * gather(weights, layout, links, modules), accumulation * back)
