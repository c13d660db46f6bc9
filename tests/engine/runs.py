"""Whole runs of the worker without Ray: fresh processes, which a test may kill at any point, as a cluster does."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gtl.bench.models import write_dataset
from gtl.config import parse_recipe
from gtl.families import open_family
from gtl.storage import Store
from gtl.train.job import Job
from gtl.types import Batch, Losses
from tests.engine.group import CONTEXT

IMAGES = 10
FEW = "builtin:scenes"
"""What the source of the target domain is called."""
TIMEOUT_S = 180
ROOM = 2


@dataclass(frozen=True)
class Kill:
    """Where a process ends itself by SIGKILL."""

    rank: int
    where: str
    """step: within the optimizer's. write: in the middle of a checkpoint's file. commit: before its manifest.
    memory: by an error, at a forward pass of more than `ROOM` images, and at all of them after that."""
    number: int
    """The how many-th of them."""
    saved: int = 0
    """Not before the checkpoint of this step is whole: it may be written beside the steps after it."""
    patience_s: float = 0.0
    """Of a write: so long it lets training go on before it dies."""


def make_job(
    folder: Path, tuner: dict[str, Any] | None = None, objective: dict[str, Any] | None = None, targets: int = 0,
    **train: Any,
) -> Job:  # fmt: skip
    """A run of the built-in model on random images, so many of a target domain; they are in the folder's cache."""
    family = open_family("builtin:tiny")
    dataset = write_dataset(Store(folder / "cache"), family, IMAGES)
    dataset.entries = [
        replace(entry, record=replace(entry.record, is_target=i < targets)) for i, entry in enumerate(dataset.entries)
    ]
    dataset.save()
    recipe = parse_recipe({
        "model": {"source": "builtin:tiny"},
        "tuner": tuner or {"type": "lora", "rank": 4},
        "objective": objective or {},
        "data": {"source": [{"source": "photos"}, {"source": FEW}], "resolution": 64},
        "train": {"steps": 9, "batch_size": 3, "ema": 0.9, "checkpoints": {"every": 2}, **train},
        "evaluate": {"prompts": []},
        "storage": {place: f"{folder}/{place}" for place in ("runs", "cache", "registry")},
    })
    return Job(recipe.model_dump(mode="json"), "dog", "v1", dataset.fingerprint, family.fingerprint(), "fp32")


def go(job: Job, workers: int, kill: Kill | None = None) -> list[int]:
    """Run a job's workers to their end; their exit codes. When one dies, the others follow, as under Ray Train."""
    with tempfile.TemporaryDirectory() as folder:
        address = (Path(folder) / "rendezvous").as_uri()
        processes = [
            CONTEXT.Process(target=member, args=(rank, workers, address, job, kill)) for rank in range(workers)
        ]  # fmt: skip
        for process in processes:
            process.start()
        end = time.monotonic() + TIMEOUT_S
        while any(process.is_alive() for process in processes):
            assert time.monotonic() < end, "the workers hang"
            if any(process.exitcode for process in processes):
                for process in processes:
                    process.join(5)
                    process.kill()
            time.sleep(0.05)
    return [process.exitcode or 0 for process in processes]


def member(rank: int, world: int, address: str, job: Job, kill: Kill | None) -> None:
    """One worker."""
    import torch
    import torch.distributed as dist

    from gtl.train.worker import run

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    if kill is not None and kill.rank == rank:
        arm(kill, job)
    run(job, torch.device("cpu"), lambda row: heard(job, row))


def heard(job: Job, row: Mapping[str, float]) -> None:
    """Note a step that a worker reports, in a file that no resuming shortens."""
    with open(f"{job.run.url()}.told", "a") as file:
        file.write(f"{int(row['step'])}\n")


def told(job: Job) -> list[int]:
    """Every step that was reported, also those that were made again."""
    return [int(line) for line in Path(f"{job.run.url()}.told").read_text().split()]


def arm(kill: Kill, job: Job) -> None:
    """Let this process die where it was told to."""
    import torch

    from gtl.train.checkpoint import MANIFEST
    from gtl.train.engine import Engine
    from gtl.train.job import CHECKPOINTS

    left = kill.number

    def strike() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            while kill.saved and not job.run.exists(f"{CHECKPOINTS}/{kill.saved:08d}/{MANIFEST}"):
                time.sleep(0.01)
            time.sleep(kill.patience_s)
            os.kill(os.getpid(), signal.SIGKILL)

    if kill.where == "step":
        step = Engine.step

        def dying_step(self: Engine) -> None:
            strike()
            step(self)

        Engine.step = dying_step  # type: ignore[method-assign]
        return
    if kill.where == "memory":
        forward = Engine.__call__

        def full_forward(self: Engine, batch: Batch) -> Losses | None:
            nonlocal left
            left -= len(batch.weight) > ROOM
            if left <= 0 and len(batch.weight) > ROOM:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(self, batch)

        Engine.__call__ = full_forward  # type: ignore[method-assign]
        return
    write = Store.write

    def dying_write(self: Store, key: str, data: bytes, *rest: Any, **named: Any) -> None:
        if "checkpoints/" in key and key.endswith(MANIFEST) == (kill.where == "commit"):
            if kill.where == "write" and left == 1:
                target = Path(self.path(key))
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data[: len(data) // 2])
            strike()
        write(self, key, data, *rest, **named)

    Store.write = dying_write  # type: ignore[method-assign]


def learned(job: Job) -> dict[str, bytes]:
    """What a finished run leaves to learn from: its adapter's files."""
    return {key: job.run.read(key) for key, _, _ in job.run.list("adapter")}
