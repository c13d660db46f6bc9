"""Process groups that nobody else makes: of benchmarks, and of a process that trains alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextmanager
def process_group(folder: str, device: torch.device, rank: int = 0, world: int = 1) -> Iterator[None]:
    """The group of a run's workers, which meet in a folder; of this process alone when there is one."""
    import torch.distributed as dist

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=Path(folder, "rendezvous").as_uri(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
