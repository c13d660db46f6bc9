"""Features that were computed once are kept, by the network's weights and the bytes of pictures or texts."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, TypeVar

from gtl.storage import Store
from gtl.types import Progress, UserError, quiet

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T", contravariant=True)
CHUNK = 256
"""Pictures, or texts, that are read at a time, and kept in one file."""
READERS = 16
"""Files that are read at once."""

Row = tuple["Tensor", ...]
"""Features of a picture or text and, of a classifier, its logits."""


class Network(Protocol[T]):
    """A `Backbone`, or what does to texts as one does to pictures."""

    name: str

    def fingerprint(self) -> str:
        """See `Backbone`."""
        ...

    def __call__(self, items: Sequence[T], /) -> tuple[Tensor, Tensor | None]:
        """See `Backbone`."""
        ...


def features_of(
    network: Network[T],
    hashes: Sequence[str],
    read: Callable[[int], T],
    cache: Store,
    progress: Progress = quiet,
) -> tuple[Tensor, Tensor | None]:
    """Features [N, dimensions] and logits [N, classes] or None of pictures or texts; computes what the cache lacks.

    A file of the cache holds up to CHUNK of them and never changes. Two that compute the same ones at once write a file
    each: both mean the same, and either counts.

    Args:
        network: Computes them.
        hashes: SHA-256 of the bytes of each, in hex.
        read: The one at a position; is asked once for each one that is missing.
        cache: The cache's root.
        progress: Is called as it goes on.

    Raises:
        ValueError: nothing to look at.
        UserError: the cache cannot be reached or written, or a file of it is damaged.
    """
    import torch

    if not hashes:
        raise ValueError("nothing to look at")
    store = cache.sub(f"features/{network.fingerprint()[:32]}")
    wanted = {digest: position for position, digest in reversed(list(enumerate(hashes)))}
    rows = _stored(store, wanted)
    missing = sorted(position for digest, position in wanted.items() if digest not in rows)
    for start in range(0, len(missing), CHUNK):
        progress("features", start, len(missing), network.name)
        chunk = [hashes[position] for position in missing[start : start + CHUNK]]
        features, logits = network([read(wanted[digest]) for digest in chunk])
        tensors = {"features": features} if logits is None else {"features": features, "logits": logits}
        _store(store, chunk, tensors)
        rows.update(zip(chunk, zip(*tensors.values(), strict=True), strict=True))
    if missing:
        progress("features", len(missing), len(missing), network.name)
    columns = [torch.stack(column) for column in zip(*(rows[digest] for digest in hashes), strict=True)]
    return columns[0], columns[1] if len(columns) == 2 else None


def _store(store: Store, hashes: Sequence[str], tensors: dict[str, Tensor]) -> None:
    import torch
    from safetensors.torch import save

    digests = torch.tensor([list(bytes.fromhex(digest)) for digest in hashes], dtype=torch.uint8)
    name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.safetensors"
    store.write(name, save({"hashes": digests, **tensors}))


def _stored(store: Store, wanted: dict[str, int]) -> dict[str, Row]:
    """What the cache has of those that are wanted."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    rows: dict[str, Row] = {}
    names = [key for key, _, _ in store.list(recursive=False) if key.endswith(".safetensors")]
    with ThreadPoolExecutor(READERS) as pool:
        for name, data in zip(names, pool.map(store.read, names), strict=True):
            try:
                tensors = load(data)
            except SafetensorError as error:
                raise UserError(f"{store.url(name)}: damaged ({error}); remove it") from error
            parts = [tensors[part] for part in ("features", "logits") if part in tensors]
            for position, digest in enumerate(tensors["hashes"].numpy()):
                if (key := digest.tobytes().hex()) in wanted:
                    rows[key] = tuple(part[position] for part in parts)
    return rows
