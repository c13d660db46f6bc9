"""Processes that form one gloo group and run functions together, so that tests pay for importing torch once."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

TIMEOUT_S = 120

# Forked from a process that has imported everything: a start takes a second instead of ten.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([
    "deepspeed", "diffusers.models.unets.unet_2d_condition", "peft", "gtl.train.engine", "gtl.train.look",
    "gtl.train.worker", "gtl.tuners.lora", "gtl.tuners.full", "gtl.objectives.denoise", "gtl.families.sd",
])  # fmt: skip


class Group:
    """A gloo group of `size` processes; `run` calls a module-level function in all of them."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        address = (Path(self._folder.name) / "rendezvous").as_uri()
        self._pipes = []
        self._processes = []
        for rank in range(size):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(target=member, args=(rank, size, address, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returned on each rank; a failure on any of them fails with its traceback."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_S):
                raise TimeoutError(f"rank {rank} of {len(self._pipes)} did not answer within {TIMEOUT_S} s")
            results.append(pipe.recv())
        failures = [f"rank {rank}:\n{result}" for rank, (ok, result) in enumerate(results) if not ok]
        if failures:
            raise AssertionError("\n".join(failures))
        return [result for _, result in results]

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def member(rank: int, size: int, address: str, pipe: Any) -> None:
    """One process of a group: takes functions from its pipe for ever."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    while True:
        function, arguments = pipe.recv()
        try:
            answer = (True, function(*arguments))
        except BaseException:  # goes to the test, as text
            answer = (False, traceback.format_exc())
        pipe.send(answer)
