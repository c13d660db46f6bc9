"""`gtl bench train --workers --predict`: what `gtl plan` works out of a step, beside the clock, on CPUs.

Every number of workers measures its rates in turn with its steps, all of its workers at once: how fast each multiplies
matrices and adds tensors, and what an all-reduce takes. The first number of workers also takes steps of half as many
images: the difference says which share of its matrix rate training attains, the rest what a pass takes that no image
adds. The others are predicted with these two, and nothing of their own steps.

All of it is done by two clocks. By that on the wall more workers than cores have the rates of a share of a core, and
whatever else runs on the machine is in the rates and in the steps, not always in both alike. By the processor time of
a worker neither others nor waiting count: there the model is of a step where every worker has a core.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from gtl.bench.matrices import matmul_flops
from gtl.report.text import columns
from gtl.train.pace import Pace, Rates, pace
from gtl.train.traffic import Layout, Links, all_reduce

if TYPE_CHECKING:
    import torch

    from gtl.bench.setting import Setting
    from gtl.config import Recipe
    from gtl.train.footprint import Footprint
    from gtl.train.plan import TrainPlan

MESSAGE = 2**22
"""fp32 elements of an all-reduce: 16 MiB."""
CALLS = 20
"""All-reduces of one element in a timing."""
TIMINGS = 3


class Speeds(NamedTuple):
    """What a worker measured while all others did the same."""

    flops: float
    """Operations a second in products of matrices."""
    memory: float
    """Bytes a second of sums of large tensors."""
    link: float
    """Bytes a second that a worker sends in an all-reduce; infinite for one worker."""
    latency: float
    """Seconds of an all-reduce of one element."""


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass(frozen=True)
class Seen:
    """What a clock said of some workers."""

    workers: int
    step: float
    """Seconds, median of rounds."""
    sent: float
    """Share of the step in collective calls while all workers are in them."""
    late: float
    """Share of the step in such calls before the last worker comes, which no model of what is sent knows of."""
    speeds: Speeds
    """Medians of rounds."""
    fewer: tuple[int, float] | None = None
    """Images of a forward pass of one worker that was measured with fewer, and its step in as many passes."""


def measure_speeds(device: torch.device, clock: Callable[[], float]) -> Speeds:
    """Collective: all workers multiply at once, then add at once, then talk."""
    import torch
    import torch.distributed as dist

    world = dist.get_world_size()
    dist.barrier()
    flops = matmul_flops(device, torch.float32, clock)
    one, two = torch.rand(MESSAGE), torch.rand(MESSAGE)
    dist.barrier()
    added = median_seconds(lambda: one.add_(two), clock)
    memory = 3 * one.nbytes / added
    if world == 1:
        return Speeds(flops, memory, float("inf"), 0.0)
    dot = torch.zeros(1)
    latency = median_seconds(lambda: [dist.all_reduce(dot) for _ in range(CALLS)], clock) / CALLS
    taken = max(median_seconds(lambda: dist.all_reduce(one), clock) - latency, 1e-9)
    at_one = all_reduce(one.nbytes, Layout(1, world), Links(1.0, 1.0, 0.0))
    return Speeds(flops, memory, at_one / taken, latency)


def median_seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Of some calls, after one that warms up."""
    seconds = []
    for _ in range(TIMINGS + 1):
        begun = clock()
        call()
        seconds.append(clock() - begun)
    return statistics.median(seconds[1:])


def shares_of_calls(steps: Callable[[], object]) -> tuple[float, float]:
    """Shares of the time of some steps that pass in gloo's collective calls, see `Seen`. Collective.

    A call lasts as long as it takes the worker that comes last, and longer for those that wait for it.
    """
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        begun = time.perf_counter()
        steps()
        seconds = time.perf_counter() - begun
    results: Any = seen.profiler
    calls = [event for event in results.kineto_results.events() if event.name().startswith("gloo:")]
    mine = [call.duration_ns() / 1e9 for call in sorted(calls, key=lambda call: call.start_ns())]
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, mine)
    sent = sum(map(min, zip(*of_all, strict=True)))
    return sent / seconds, (sum(mine) - sent) / seconds


def medians(rounds: Sequence[Speeds]) -> Speeds:
    """Of every speed by itself."""
    return Speeds(*(statistics.median(column) for column in zip(*rounds, strict=True)))


def predict(footprint: Footprint, recipe: Recipe, stage: int, seen: Sequence[Seen]) -> list[Pace]:
    """Every number of workers' step; of the first, which is measured to know what training attains, the same again.

    Args:
        footprint: Of the recipe's model.
        recipe: With a micro-batch that a worker's share of the batch is one of.
        stage: Of ZeRO.
        seen: What was measured.
    """
    first = seen[0]
    unknown = step_at(footprint, recipe, stage, first, 1.0)
    spent = max(first.step - unknown.optimizer - unknown.waited, 0.1 * first.step)
    launch = 0.0
    if first.fewer is not None:
        images, step = first.fewer
        of_images = (first.step - step) * unknown.micro_batch / (unknown.micro_batch - images)
        launch = min(max(spent - of_images, 0.0), 0.9 * spent)
    attained = unknown.compute / (spent - launch)
    return [step_at(footprint, recipe, stage, each, attained, launch / unknown.accumulation) for each in seen]


def step_at(
    footprint: Footprint, recipe: Recipe, stage: int, seen: Seen, attained: float, launch: float = 0.0
) -> Pace:  # fmt: skip
    """The model's step where training attains a share of the matrix rate, and a pass takes so many seconds besides."""
    from gtl.train.plan import choose

    speeds = seen.speeds
    links = Links(speeds.link, speeds.link, speeds.latency)
    plan = choose(recipe, workers=seen.workers, steps_per_epoch=1)
    return pace(
        footprint, recipe.train, Layout(1, seen.workers),
        Rates(attained * speeds.flops, speeds.memory, links, overlap=False, launch=launch),
        stage=stage, micro_batch=plan.micro_batch, accumulation=plan.accumulation,
    )  # fmt: skip


def halved(setting: Setting, workers: int, plan: TrainPlan) -> Setting | None:
    """Steps of as many passes, each of half as many images; None if a pass has one."""
    size = plan.micro_batch // 2
    return replace(setting, batch_size=size * plan.accumulation * workers, micro_batch=size) if size else None


def rows(seen: Sequence[Seen], predicted: Sequence[Pace]) -> list[dict[str, Any]]:
    """Both beside each other, in seconds and shares."""
    return [
        {
            "workers": one.workers, "step": one.step, "predicted_step": made.step, "error": made.step / one.step - 1,
            "communication": one.sent, "predicted_communication": made.communication, "late": one.late,
            **one.speeds._asdict(),
        }
        for one, made in zip(seen, predicted, strict=True)
    ]  # fmt: skip


def table(found: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """For reading."""
    steps = [["workers", "clock", "step ms", "predicted", "error", "GFLOP/s", "link MB/s", "call ms"]]
    for clock, rows in found.items():
        for row in rows:
            steps.append([
                str(row["workers"]), clock, f"{1e3 * row['step']:.1f}", f"{1e3 * row['predicted_step']:.1f}",
                f"{row['error']:+.1%}", f"{row['flops'] / 1e9:.1f}",
                f"{row['link'] / 1e6:.0f}" if row["workers"] > 1 else "", f"{1e3 * row['latency']:.2f}",
            ])  # fmt: skip
    shares = [["workers", "communication", "predicted", "waiting for the last worker"]]
    for row in found["wall"]:
        seen = (row["communication"], row["predicted_communication"], row["late"])
        shares.append([str(row["workers"]), *(f"{share:.1%}" for share in seen)])
    return f"{columns(steps, numbers=True)}\n\n{columns(shares, numbers=True)}"
