"""The content-addressed cache of tensors: shards with append-only manifests, in a folder or a bucket."""

from __future__ import annotations

import hashlib
import json
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtl.families.files import cache_home
from gtl.storage import Store

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 2**28
"""Writers begin a new shard beyond this; 256 MiB."""
OPEN_SHARDS = 128
"""Shards that a reader keeps mapped."""
SHARD, MANIFEST = ".safetensors", ".jsonl"


def prompt_key(caption: str) -> str:
    """Cache key of a caption's embeddings."""
    return hashlib.sha256(caption.encode()).hexdigest()[:32]


class Space:
    """Tensors made by one encoder in one dtype, by key. Any number of writers and readers at once.

    A shard is one safetensors file with a tensor `key/name` for every name of every key; its manifest has a line for
    every key and is written after it, so a shard that was not finished is never seen. Neither changes afterwards. Two
    writers may store the same key: it means the same, and either counts. Threads may read at once.
    """

    def __init__(self, store: Store, name: str) -> None:
        """`store` is the cache's root; nothing is read yet."""
        self.name = name
        self._store = store.sub(f"tensors/{name}")
        self._names: dict[str, list[str]] = {}
        self._shards: dict[str, str] = {}
        self._listed: set[str] = set()
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: str) -> bool:
        return key in self._shards

    def __len__(self) -> int:
        return len(self._shards)

    def refresh(self) -> None:
        """Read the manifests that came since the last call.

        Raises:
            UserError: the store cannot be reached.
        """
        keys = {key for key, _, _ in self._store.list(recursive=False)}
        new = sorted(k for k in keys if k.endswith(MANIFEST) and k not in self._listed and shard_of(k) in keys)
        with ThreadPoolExecutor(16) as pool:
            for manifest, data in zip(new, pool.map(self._store.read, new), strict=True):
                for line in data.splitlines():
                    row = json.loads(line)
                    self._names.setdefault(row["key"], row["names"])
                    self._shards.setdefault(row["key"], shard_of(manifest))
        self._listed.update(new)

    def write(self, items: Mapping[str, Mapping[str, Tensor]]) -> str:
        """Add a shard with these keys; its name.

        Raises:
            UserError: the disk is full, or the store cannot be reached.
        """
        from safetensors.torch import save

        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        tensors = {f"{key}/{part}": t.contiguous() for key, parts in items.items() for part, t in parts.items()}
        lines = [json.dumps({"key": key, "names": list(parts)}) for key, parts in items.items()]
        self._store.write(name + SHARD, save(tensors))
        self._store.write(name + MANIFEST, "\n".join(lines).encode())
        return name

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of a key, mapped from the shard's file rather than read where the platform can.

        Raises:
            KeyError: the key is not in the manifests read so far.
            UserError: the store cannot be reached.
        """
        shard = self._shards[key]
        with self._lock:
            file = self._open.get(shard)
        if file is None:
            from safetensors import safe_open

            # Outside the lock, since it may fetch the shard; two threads that do so open the same file.
            file = safe_open(self._local(shard), framework="pt")
        with self._lock:
            self._open[shard] = file
            self._open.move_to_end(shard)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return {name: file.get_tensor(f"{key}/{name}") for name in self._names[key]}

    def _local(self, shard: str) -> Path:
        """The shard's file on this machine; one in a bucket is fetched once for all processes."""
        if self._store.is_local:
            return Path(self._store.path(shard))
        from filelock import FileLock

        place = hashlib.sha256(self._store.url().encode()).hexdigest()[:16]
        target = cache_home() / "shards" / place / shard
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_suffix(".lock")):
                if not target.exists():
                    self._store.download(shard, target)
        return target


def shard_of(manifest: str) -> str:
    """The shard's key, from its manifest's."""
    return manifest.removesuffix(MANIFEST) + SHARD


def sweep(store: Store, is_used: Callable[[str], bool], older_than: float) -> tuple[int, int]:
    """Remove shards none of whose keys is used, and shards that were never finished; (how many, their bytes).

    Args:
        store: The cache's root.
        is_used: Whether a dataset needs `space/key`.
        older_than: Only what was written before this time (seconds since the epoch): a running fill has not told yet
            what it needs its newest shards for.
    """
    removed = freed = 0
    tensors = store.sub("tensors")
    listing = {key: (size, mtime) for key, size, mtime in tensors.list()}
    for shard, (size, mtime) in listing.items():
        if not shard.endswith(SHARD) or mtime / 1e9 > older_than:
            continue
        manifest = shard.removesuffix(SHARD) + MANIFEST
        if manifest in listing and any(map(is_used, _manifest_keys(tensors, manifest))):
            continue
        # The manifest goes first: a reader must not see a shard that is about to go.
        tensors.delete(manifest)
        tensors.delete(shard)
        removed, freed = removed + 1, freed + size
    return removed, freed


def _manifest_keys(tensors: Store, manifest: str) -> Iterable[str]:
    space = manifest.rpartition("/")[0]
    return (f"{space}/{json.loads(line)['key']}" for line in tensors.read(manifest).splitlines())
