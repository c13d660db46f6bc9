"""Adapters of buckets, on this machine's disk: within a bound, the longest unused going first."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gtl.families.files import cache_home

USE = ".{}.use"
"""Beside a version's folder: locked, shared, by whoever reads there; its time is that of the last use."""


def place_of(root: str, key: str) -> Path:
    """Folder of a version NAME/VERSION of a bucket."""
    return home() / hashlib.sha256(root.encode()).hexdigest()[:16] / key


def home() -> Path:
    """Where those of all buckets are."""
    return cache_home() / "adapters"


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Be the only one who changes a version's folder; who else wants to waits."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # workers of one machine come at the same moment
        yield


def use(folder: Path, until: ExitStack | None = None) -> None:
    """Note that a folder is used, and keep it until the stack closes. Only inside `changing`."""
    mark = folder.with_name(USE.format(folder.name))
    mark.touch()
    if until is not None:  # a file that is dropped is closed too, so that a stack that nobody closes holds nothing
        file = until.enter_context(mark.open("rb"))
        fcntl.flock(file, fcntl.LOCK_SH)


def trim(most: int) -> None:
    """Remove the longest unused versions until all have no more bytes than this; those that are in use stay."""
    from filelock import FileLock, Timeout

    found = sorted((last_use(folder), size_of(folder), folder) for folder in home().glob("*/*/[!.]*"))
    total = sum(size for _, size, _ in found)
    for _, size, folder in found:
        if total <= most:
            return
        try:
            with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
                if remove_unused(folder):
                    total -= size
        except Timeout:  # it is being fetched or removed just now
            continue


def remove_unused(folder: Path) -> bool:
    """Remove a folder that nobody reads; whether it is gone."""
    mark = folder.with_name(USE.format(folder.name))
    if not mark.exists():
        mark.touch()
    with mark.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(folder, ignore_errors=True)
    return True


def last_use(folder: Path) -> int:
    """When, in nanoseconds; of one that was never noted, when it came."""
    try:
        return folder.with_name(USE.format(folder.name)).stat().st_mtime_ns
    except FileNotFoundError:
        return folder.stat().st_mtime_ns if folder.is_dir() else 0


def size_of(folder: Path) -> int:
    """Bytes of its files; those that go meanwhile count nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue
    return total
