"""What a recipe's steps take on a cluster that one may not have: by ZeRO stage and by number of machines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gtl.config import Recipe
from gtl.report.chart import short
from gtl.report.text import columns
from gtl.train.gpus import GPUS, find_gpu
from gtl.train.pace import Pace, Rates, pace
from gtl.train.plan import STAGES, Memory, choose, need, settle_sizes
from gtl.train.traffic import Layout, Links
from gtl.types import UserError

if TYPE_CHECKING:
    from gtl.train.forecast import Hardware

UTILIZATION = 0.25
"""Share of a GPU's peak that arithmetic attains, recomputation counted. 0.12 was measured of a LoRA of SD 1.5 at 512 px
(gtl/bench/RESULTS.md, an H200); published are 0.16 of all of FLUX.1 on 32 H100 and 0.33 of a video model of 14 billion
on 128: it is a guess until a run's `mfu` replaces it, times 4/3 if that run recomputes, which `mfu` does not count."""
LINK = 0.8
"""Share of a link's rate that collective calls attain; nccl-tests come to about so much of NVLink."""
LATENCY = 20e-6
"""Seconds of a collective call that sends next to nothing, on GPUs."""


@dataclass(frozen=True)
class Asked:
    """What the user who plans knows of the cluster."""

    price: float | None = None
    """Dollars an hour of one GPU. None: no costs are said."""
    network: float | None = None
    """Gbit/s of one machine. None: what is usual for its GPUs."""
    utilization: float | None = None
    """Share of the peak that arithmetic attains. None: UTILIZATION."""

    @property
    def attained(self) -> float:
        """That share."""
        return UTILIZATION if self.utilization is None else self.utilization

    def check(self) -> None:
        """Refuse what can't be.

        Raises:
            UserError: names the option.
        """
        if self.price is not None and not 0 <= self.price < math.inf:
            raise UserError(f"--price: {self.price:g}: dollars for an hour of one GPU, 0 or more")
        if self.network is not None and not 0 < self.network < math.inf:
            raise UserError(f"--network: {self.network:g}: Gbit/s of one machine, more than 0")
        if not 0 < self.attained <= 1:
            raise UserError(f"--utilization: {self.attained:g}: a share of the peak, more than 0 and at most 1")


@dataclass(frozen=True)
class Line:
    """A ZeRO stage on so many machines, with the largest micro-batch that fits."""

    pace: Pace
    fits: bool
    chosen: bool
    """By `auto`, or by the recipe."""


@dataclass(frozen=True)
class Outlook:
    """All of them."""

    lines: tuple[Line, ...]
    rates: Rates
    network: float
    """Gbit/s of a machine."""
    asked: Asked
    steps: int | None
    """Of the run; None where the recipe says epochs."""


def untimed(recipe: Recipe, hardware: Hardware, dtype: str) -> str:
    """Why no times can be said, if so."""
    if not hardware.is_gpu or recipe.train.gpus_per_worker == 0:
        return "of CPUs nothing is known beforehand; gtl bench train --workers 1 --predict measures them"
    if find_gpu(hardware.kind) is None:
        return f"of {hardware.kind} only the memory is known; kinds with rates are {', '.join(GPUS)}"
    if dtype != "bf16":
        return f"model.dtype: {dtype}: of GPUs only the rate in bf16 is known"
    if (offload := recipe.train.zero.offload) != "none":
        return f"train.zero.offload: {offload}: how fast machines step the optimizer is not known"
    return ""


def outlook(recipe: Recipe, hardware: Hardware, memory: Memory, asked: Asked) -> Outlook:
    """Go through node counts and stages. `hardware` has a kind of GPU that is in the table."""
    gpu = find_gpu(hardware.kind)
    assert gpu is not None
    network = gpu.network * hardware.devices if asked.network is None else asked.network
    links = Links(LINK * gpu.inner, LINK * network * 1e9 / 8, LATENCY)
    rates = Rates(asked.attained * gpu.flops, gpu.memory, links, overlap=True)
    lines = [line for layout in layouts(recipe, hardware) for line in lines_of(recipe, layout, memory, rates)]
    return Outlook(tuple(lines), rates, network, asked, recipe.train.steps)


def layouts(recipe: Recipe, hardware: Hardware) -> Iterator[Layout]:
    """1, 2, 4 and so on machines up to all; where the recipe says how many workers there are, only those."""
    workers, hpz = recipe.train.workers, recipe.train.zero.hpz
    if workers != "auto":
        fewest = workers[0] if isinstance(workers, tuple) else workers
        yield Layout(math.ceil(fewest / hardware.devices), fewest)
        return
    counts = [2**power for power in range(hardware.nodes.bit_length())]
    for nodes in dict.fromkeys([*counts, hardware.nodes]):
        if nodes * hardware.devices % hpz == 0:
            yield Layout(nodes, nodes * hardware.devices)


def lines_of(recipe: Recipe, layout: Layout, memory: Memory, rates: Rates) -> Iterator[Line]:
    """A line a stage."""
    train, workers = recipe.train, layout.workers
    try:
        chosen: int | None = choose(recipe, workers=workers, steps_per_epoch=1, memory=memory).stage
    except UserError:
        chosen = None
    share = math.ceil(train.batch_size / workers)
    for stage in STAGES[: recipe.max_zero_stage + 1]:
        zero = train.zero.model_copy(update={"stage": stage})
        fixed = recipe.model_copy(update={"train": train.model_copy(update={"zero": zero})})
        _, size = settle_sizes(fixed, workers, share, memory)
        total = need(memory.footprint, recipe, stage=stage, workers=workers, micro_batch=size).total
        found = pace(
            memory.footprint, train, layout, rates, stage=stage, micro_batch=size, accumulation=math.ceil(share / size)
        )
        yield Line(found, total <= memory.budget, stage == chosen)


def render(found: Outlook, recipe: Recipe, kind: str) -> str:
    """For people to read."""
    price, steps = found.asked.price, found.steps
    header = ["nodes", "GPUs", "stage", "micro-batch", "step s", "images/s", "communication", "at most", "GPU-h"]
    header += [*(["$"] if price is not None else []), *(["run h"] if steps else [])]
    header += ["run $"] if price is not None and steps else []
    table = [header, *(_cells(line, price, steps) for line in found.lines)]
    links, kept = found.rates.links, recipe.model.quantization
    left = ["launching kernels", "late workers", "reading data", "looks", "checkpoints", "start"]
    left += [f"unpacking {kept}"] if kept else []
    rates = (
        f"arithmetic at {found.asked.attained:.0%} of {kind}'s peak in bf16 (--utilization); from a GPU to others "
        f"of its machine {links.inner / LINK / 1e9:g} GB/s, from a machine to others {found.network:g} Gbit/s "
        f"(--network), {LINK:.0%} of them attained; {LATENCY * 1e6:g} us a call; "
        + (f"${price:g} an hour of a GPU (--price)" if price is not None else "no price (--price)")
    )
    run = f", and the run's {steps}" if steps else ""
    title = f"steps of {recipe.train.batch_size} images{run}, by machines and ZeRO stage (* chosen, ! does not fit):"
    facts = [
        ["GPU-h" if price is None else "GPU-h, $", "of 1,000 images"],
        ["communication", "share of a step that waits for it, if all is hidden that runs beside arithmetic, as "
                          "DeepSpeed has it on GPUs; at most: if nothing is"],
        ["assumed", rates],
        ["not in it", ", ".join(left)],
    ]  # fmt: skip
    return "\n".join([title, columns(table, numbers=True), columns(facts)])


def _cells(line: Line, price: float | None, steps: int | None) -> list[str]:
    one = line.pace
    hours, whole = one.device_hours(1000), one.step * (steps or 0) / 3600
    cells = [three(one.step), three(one.images_per_second), f"{one.communication:.1%}", f"{one.most:.1%}", three(hours)]
    cells += [f"{hours * price:.2f}"] if price is not None else []
    cells += [three(whole)] if steps else []
    cells += [f"{whole * one.layout.workers * price:.2f}"] if price is not None and steps else []
    mark = "*" if line.chosen else " "
    stage = f"{one.stage}{mark}{' ' if line.fits else '!'}"
    return [str(one.layout.nodes), str(one.layout.workers), stage, str(one.micro_batch), *cells]


def three(value: float) -> str:
    """A number in three digits."""
    return short(float(f"{value:.3g}"))


def as_json(found: Outlook) -> dict[str, Any]:
    """For programs: under the names of the classes here, with what follows from them."""
    values = asdict(found)
    for row, line in zip(values["lines"], found.lines, strict=True):
        one, price = line.pace, found.asked.price
        hours = one.device_hours(1000)
        row["pace"] |= {
            "step": one.step, "communication": one.communication, "most": one.most,
            "images_per_second": one.images_per_second, "gpu_hours_per_1000_images": hours,
            "dollars_per_1000_images": None if price is None else hours * price,
        }  # fmt: skip
        run = one.step * found.steps / 3600 if found.steps else None
        row["pace"] |= {
            "run_hours": run,
            "run_dollars": None if run is None or price is None else run * one.layout.workers * price,
        }
    return values
