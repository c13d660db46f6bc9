"""`gtl doctor`: whether this machine and its stores have what training needs, each looked at by using it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from gtl.session import free_port
from gtl.storage import Store
from gtl.types import Progress, UserError, quiet

STORES = {"GTL_RUNS": "./runs", "GTL_CACHE": "./cache", "GTL_REGISTRY": "./registry"}
LEAST_FREE = 5 * 2**30
"""Bytes free on a local store's disk; checkpoints and a cache soon take more."""
GROUP_SECONDS = 120
GROUP = """
import datetime, sys, torch, torch.distributed as dist
backend, rank, port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
device = f"cuda:{rank}" if backend == "nccl" else "cpu"
dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=60))
total = torch.full((1024,), rank + 1.0, device=device)
dist.all_reduce(total)
assert float(total.sum()) == 3 * 1024
dist.destroy_process_group()
"""
"""One of two processes that add up a tensor."""


@dataclass(frozen=True)
class Finding:
    """What was looked at, and how it is."""

    subject: str
    state: Literal["ok", "warning", "missing"]
    """warning: training works, but; missing: it will not."""
    detail: str


def examine(progress: Progress = quiet) -> list[Finding]:
    """Look at everything; takes seconds, and a minute where a bucket does not answer."""
    findings: list[Finding] = []
    for done, look in enumerate(LOOKS):
        progress("look", done, len(LOOKS), look.__name__.replace("_", " "))
        findings += look()
    return findings


def versions() -> Iterator[Finding]:
    """Of Python and of every library that gtl needs, against the ranges it was made for."""
    from packaging.requirements import Requirement

    yield Finding("python", "ok", f"{platform.python_version()} ({sys.executable}), {platform.platform()}")
    try:
        needs = importlib.metadata.requires("gtl") or []
    except importlib.metadata.PackageNotFoundError:
        needs = []
        yield Finding("gtl", "warning", "not installed, only on the path; what it needs is not known")
    for text in needs:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(wanted.name, "missing", f"not installed; pip install '{wanted}'")
            continue
        fits = wanted.specifier.contains(version, prereleases=True)
        detail = version if fits else f"{version}, but gtl needs {wanted.specifier}; pip install '{wanted}'"
        yield Finding(wanted.name, "ok" if fits else "missing", detail)


def devices() -> Iterator[Finding]:
    """GPUs, or else the CPUs that do their work."""
    import torch

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cpu", "ok", f"{cpus} cores, {memory:.0f} GiB memory")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        yield Finding(f"gpu {index}", "ok", f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {bf16}")
    if not torch.cuda.device_count():
        reason = "torch is built without CUDA" if torch.version.cuda is None else "torch sees none; see nvidia-smi"
        there = shutil.which("nvidia-smi") is not None
        yield Finding("gpu", "warning" if there else "ok", f"none ({reason}); training runs on the CPU")


def compiler() -> Iterator[Finding]:
    """For torch.compile; nothing else is compiled when gtl trains."""
    from gtl.train.blocks import find_compiler

    path = find_compiler()
    yield Finding("compiler", "ok" if path else "warning", path or "no C++ compiler; train.compile: true needs one")


def communication() -> Iterator[Finding]:
    """Two processes add up a tensor, as workers do: gloo on CPUs, NCCL on GPUs."""
    import torch

    backends = ["gloo", *(["nccl"] if torch.cuda.device_count() > 1 else [])]
    for backend in backends:
        started = time.monotonic()
        port = str(free_port())
        command = [sys.executable, "-c", GROUP, backend]
        with ThreadPoolExecutor(2) as pool:
            ends = list(pool.map(finish, ([*command, str(rank), port] for rank in range(2))))
        errors = [end for end in ends if end]
        seconds = time.monotonic() - started
        yield Finding(backend, "missing" if errors else "ok", errors[0] if errors else f"2 processes, {seconds:.1f} s")


def finish(command: list[str]) -> str:
    """Run to the end; the last line of what went wrong, or nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GROUP_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer in {GROUP_SECONDS} s"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def cluster() -> Iterator[Finding]:
    """The Ray cluster that a command would join or start."""
    from gtl.session import session

    address = os.environ.get("RAY_ADDRESS") or "this machine"
    try:
        with session() as found:
            yield Finding("ray", "ok", f"{address}: {found.cpus:g} CPUs, {found.gpus:g} GPUs")
    except UserError as error:
        yield Finding("ray", "missing", str(error))
    shared = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None
    if shared is not None and shared < 2**30:
        yield Finding("shared memory", "warning", f"{shared / 2**20:.0f} MiB in /dev/shm; in Docker: --shm-size=2g")


def stores() -> Iterator[Finding]:
    """Write, read and delete a small object in each store."""
    for variable, default in STORES.items():
        store, key = Store(os.environ.get(variable, default)), f".doctor-{uuid.uuid4().hex}"
        subject = variable.removeprefix("GTL_").lower()
        is_new = store.is_local and not os.path.isdir(store.url())
        started = time.monotonic()
        try:
            store.write(key, b"gtl")
            if store.read(key) != b"gtl":
                raise UserError(f"{store.url()}: reads back something else")
            store.delete(key)
        except (UserError, OSError) as error:
            yield Finding(subject, "missing", f"{variable}: {error}")
            continue
        milliseconds = (time.monotonic() - started) * 1000
        free = shutil.disk_usage(store.url()).free if store.is_local else None
        if is_new:
            os.rmdir(store.url())
        room = "" if free is None else f", {free / 2**30:.0f} GiB free"
        scarce = free is not None and free < LEAST_FREE
        yield Finding(subject, "warning" if scarce else "ok", f"{store.url()}: written in {milliseconds:.0f} ms{room}")


def hub() -> Iterator[Finding]:
    """Whether models can be downloaded, or only those at hand be used."""
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        yield Finding("hub", "ok", f"offline by HF_HUB_OFFLINE; models at hand are in {HF_HUB_CACHE}")
        return
    try:
        name = huggingface_hub.whoami().get("name")
        yield Finding("hub", "ok", f"logged in as {name}")
    except Exception as error:  # without a login, without a network, behind a proxy
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        yield Finding("hub", "warning", f"no login ({reason}); public models and those in {HF_HUB_CACHE} work")


LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    versions, devices, compiler, communication, cluster, stores, hub,
)  # fmt: skip
