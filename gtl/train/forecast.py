"""`gtl plan`: what a recipe needs of a cluster and what `auto` chooses there, before anything is downloaded or run."""

from __future__ import annotations

import math
import os
import re
from dataclasses import asdict, dataclass
from typing import Any

from gtl.config import Recipe
from gtl.data.plan import num_fills
from gtl.families import open_family
from gtl.report.text import columns
from gtl.train.assemble import outline
from gtl.train.footprint import Footprint, measure
from gtl.train.gpus import GPUS, find_gpu
from gtl.train.outlook import Asked, Outlook, outlook, untimed
from gtl.train.outlook import as_json as outlook_json
from gtl.train.outlook import render as render_outlook
from gtl.train.plan import STAGES, Memory, Need, TrainPlan, check_groups, choose, need, repeats_of
from gtl.types import Progress, UserError, quiet

GIB = 2**30
SPEC = re.compile(
    r"(?:(?P<nodes>[1-9]\d*)x)?(?:(?P<gpus>[1-9]\d*)x)?"
    r"(?:(?P<gib>[1-9]\d*(?:\.\d+)?)GiB|(?P<kind>[^\dx.][^x]*))", re.ASCII
)  # fmt: skip


@dataclass(frozen=True)
class Hardware:
    """Machines that are all alike."""

    nodes: int
    devices: int
    """GPUs of a node; of a machine without any, 1."""
    kind: str
    device_bytes: float
    """Memory of a device."""
    is_gpu: bool = True

    @property
    def workers(self) -> int:
        """Devices of all nodes."""
        return self.nodes * self.devices


@dataclass(frozen=True)
class Row:
    """A ZeRO stage, at the micro-batch of the plan."""

    stage: int
    offload: bool
    """With train.zero.offload: cpu, or nvme where the recipe says so."""
    need: Need
    checkpointed: float
    """Bytes in all with train.activation_checkpointing."""


@dataclass(frozen=True)
class Forecast:
    """A recipe on some hardware."""

    source: str
    family: str
    dtype: str
    hardware: Hardware
    workers: int
    footprint: Footprint
    rows: tuple[Row, ...]
    budget: float
    """Bytes of a device that a plan may fill."""
    plan: TrainPlan | None
    """What `auto` becomes; None where nothing fits."""
    problem: str
    """Why nothing does."""
    outlook: Outlook | None = None
    """What steps take on it."""
    untimed: str = ""
    """Why that is not known."""


def forecast(
    recipe: Recipe, cluster: str | None = None, progress: Progress = quiet, known: Asked | None = None
) -> Forecast:
    """Work out a recipe's memory from the model's config files, and its steps where the GPUs are known.

    Args:
        recipe: Its data is not looked at.
        cluster: NODESxGPUSxKIND, such as 8x8xH100; GPUSxKIND or KIND is one node's. KIND may also be memory, such as
            48GiB. None: this machine.
        progress: Is called as it goes on.
        known: Prices and rates of the cluster.

    Raises:
        UserError: the cluster is not spelled so, `known` can't be, or the recipe or the model's configs are not what
            they have to be.
    """
    known = known or Asked()
    known.check()
    hardware = this_machine() if cluster is None else parse_cluster(cluster)
    asked, model = recipe.train, recipe.model
    on_gpu = hardware.is_gpu and asked.gpus_per_worker != 0
    workers = (hardware.workers if on_gpu else 1) if asked.workers == "auto" else asked.workers
    check_groups(asked.zero.hpz, workers)
    workers = workers[0] if isinstance(workers, tuple) else workers  # with fewer of them each holds more
    if on_gpu and workers > hardware.workers:
        raise UserError(f"train.workers: {workers}: --cluster {cluster or 'here'} has {hardware.workers} GPUs")
    if on_gpu and (encoder := recipe.data.gpus_per_encoder) > hardware.devices:
        raise UserError(f"data.gpus_per_encoder: {encoder}: no machine has more than {hardware.devices} GPUs")
    dtype = ("bf16" if on_gpu else "fp32") if model.dtype == "auto" else model.dtype
    progress("model", 0, 0, model.source)
    family = open_family(model.source, model.family, model.revision, model.variant, weights=False)
    footprint = measure(recipe, outline(recipe, dtype, family), "cuda" if on_gpu else "cpu")
    memory = Memory(footprint, hardware.device_bytes)
    plan, problem = None, ""
    try:
        plan = choose(recipe, workers=workers, steps_per_epoch=1, memory=memory if on_gpu else None)
    except UserError as error:
        problem = str(error)
    size = plan.micro_batch if plan else 1

    def row(stage: int, offload: bool) -> Row:
        found = need(footprint, recipe, stage=stage, workers=workers, micro_batch=size, offload=offload)
        less = found.activations - footprint.activations(size, checkpointing=True)
        return Row(stage, offload, found, found.total - less)

    stages = STAGES[: recipe.max_zero_stage + 1]
    rows = [row(stage, False) for stage in stages]
    if on_gpu and recipe.train.optimizer.type == "adamw":
        rows += [row(stage, True) for stage in stages[1:]]
    reason = untimed(recipe, hardware, dtype)
    return Forecast(
        model.source, family.name, dtype, hardware, workers, footprint, tuple(rows), memory.budget, plan, problem,
        None if reason else outlook(recipe, hardware, memory, known), reason,
    )  # fmt: skip


def parse_cluster(text: str) -> Hardware:
    """NODESxGPUSxKIND.

    Raises:
        UserError: it is not spelled so, or no GPU of that kind is known.
    """
    match = SPEC.fullmatch(text.strip())
    nodes, gpus, gib, kind = match.group("nodes", "gpus", "gib", "kind") if match else (None, None, None, None)
    if gpus is None:
        nodes, gpus = None, nodes
    if gib:
        kind, memory = f"{gib}GiB", float(gib)
    elif kind and (gpu := find_gpu(kind)):
        memory = gpu.gib
    else:
        raise UserError(
            f"--cluster {text}: expected NODESxGPUSxKIND, such as 8x8xH100, where KIND is one of {', '.join(GPUS)}, or "
            "memory such as 48GiB"
        )
    return Hardware(int(nodes or 1), int(gpus or 1), kind, memory * GIB)


def this_machine() -> Hardware:
    """Its GPUs, or its memory if there is none."""
    import torch

    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return Hardware(1, len(found), found[0].name, min(device.total_memory for device in found))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(1, 1, "CPU", memory, is_gpu=False)


def render(found: Forecast, recipe: Recipe) -> str:
    """For people to read."""
    hardware, footprint, plan = found.hardware, found.footprint, found.plan
    parts = ", ".join(f"{part} {count(number)}" for part, number in footprint.parts.items())
    dtype = f"{found.dtype} over {kind}" if (kind := recipe.model.quantization) else found.dtype
    device = "GPU" if hardware.is_gpu else "machine"
    facts = [
        ["model", f"{found.source} ({found.family}, {dtype}): {parts} parameters"],
        ["trained", f"{count(footprint.trained)} parameters by {recipe.tuner.type}"],
        ["cluster", f"{hardware.nodes} x {hardware.devices} x {hardware.kind}, {hardware.device_bytes / GIB:.1f} GiB "
                    f"each, {found.budget / GIB:.1f} GiB to fill; {plural(found.workers, 'worker')}"],
    ]  # fmt: skip
    if plan is not None:
        rest = f"accumulation {plan.accumulation} for batches of {recipe.train.batch_size}"
        spare = num_fills(recipe.train.batch_size, found.workers, plan.micro_batch)
        filled = f", filled up with {repeats_of(spare)}" if spare else ""
        facts.append(["auto", f"ZeRO stage {plan.stage}, micro-batch {plan.micro_batch}, {rest}{filled}"])
    else:
        facts.append(["auto", found.problem])
    offload = "nvme" if recipe.train.zero.offload == "nvme" else "cpu"
    header = ["GiB", "weights", "gradients", "optimizer", "buffers", "activations", "total", "checkpointed"]
    table = [[*header, {"cpu": "host", "nvme": "disk"}[offload]]]
    table += [_cells(row, found.budget, offload) for row in found.rows]
    images = plural(plan.micro_batch if plan else 1, "image")
    title = f"on each {device} with {images} of {recipe.data.resolution} px in a forward pass (! does not fit):"
    text = [columns(facts), "", title, columns(table, numbers=True)]
    times = f"times: not predicted: {found.untimed}"
    text += ["", times if found.outlook is None else render_outlook(found.outlook, recipe, hardware.kind)]
    if footprint.blocks:
        blocks = [["depth", "block", "parameters", "trained"]]
        blocks += [
            [str(i), block.name, count(block.parameters), count(block.trained)]
            for i, block in enumerate(footprint.blocks, 1)
        ]  # fmt: skip
        text += ["", f"tuner.freeze_depth K freezes the blocks up to K of {len(footprint.blocks)}:", columns(blocks)]
    return "\n".join(text)


def _cells(row: Row, budget: float, offload: str) -> list[str]:
    sizes = (row.need.weights, row.need.gradients, row.need.optimizer, row.need.buffers, row.need.activations)
    totals = (row.need.total, row.checkpointed)
    marked = [f"{total / GIB:.2f}{' ' if total <= budget else '!'}" for total in totals]
    name = f"stage {row.stage}{f', offload {offload}' if row.offload else ''}"
    moved = row.need.host + row.need.disk  # one of the two
    return [name, *(f"{size / GIB:.2f}" for size in sizes), *marked, f"{moved / GIB:.2f}"]


def plural(number: int, noun: str) -> str:
    """So many of something."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def count(number: int) -> str:
    """A number of parameters in three digits."""
    if not number:
        return "0"
    for factor, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            value = number / factor
            return f"{value:.{max(2 - int(math.log10(value)), 0)}f}{unit}"
    return str(number)


def as_json(found: Forecast) -> dict[str, Any]:
    """For programs: sizes in bytes, everything under the names of the classes here."""
    values = asdict(found)
    for row, each in zip(values["rows"], found.rows, strict=True):
        row["need"]["total"] = each.need.total
    if found.outlook is not None:
        values["outlook"] = outlook_json(found.outlook)
    if found.plan is not None:
        del values["plan"]["steps"]  # no data was looked at
    return values
