"""What was found in source files, remembered: an unchanged source costs a listing and no reading."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import NamedTuple

from gtl.storage import Store

GONE = "gone since it was listed"
CHANGED = "changed while it was being read"
PASSING = frozenset({GONE, CHANGED})
"""Reasons that say nothing of the bytes of a file, which may be whole the next time."""


class Seen(NamedTuple):
    """One image inside a source file."""

    name: str
    """Empty for an image file; the member of a tar, the row of a table."""
    sha256: str
    height: int
    width: int
    error: str
    """Why it can't be used; empty if it can."""
    captions: tuple[str, ...] | None
    """That the source file itself holds; None if it holds none."""
    offset: int = 0
    length: int = -1
    """Bytes of the source file that are the image; -1: all of it."""
    row: int = -1
    """Row of a table; -1 otherwise."""
    column: str = ""
    """Of a table that has the images which others are edits of in one of their own: that, of such an image."""
    original: str = ""
    """Name in the same file of the image that it is an edit of."""


@dataclass(frozen=True)
class SeenFile:
    """One file of a source, as it was when it had this length and modification time."""

    url: str
    size: int
    """Bytes."""
    mtime: int
    images: tuple[Seen, ...] = ()
    text: str | None = None
    """Of a caption file."""

    def dump(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def parse(cls, line: str) -> SeenFile:
        """From `dump`."""
        values = json.loads(line)
        images = (Seen(*row) for row in values["images"])  # fewer values where an older version looked
        whole = tuple(i if i.captions is None else i._replace(captions=tuple(i.captions)) for i in images)
        return cls(values["url"], values["size"], values["mtime"], whole, values["text"])


class Index:
    """Append-only memory of the files of one source; any number of writers, each adds objects of its own."""

    def __init__(self, store: Store, source: str) -> None:
        """`store` is the cache's root, `source` the URL of what was listed."""
        self._store = store.sub(f"index/{hashlib.sha256(source.encode()).hexdigest()[:16]}")

    def load(self) -> dict[str, SeenFile]:
        """What is known by URL; the newest word on a file counts."""
        known: dict[str, SeenFile] = {}
        with ThreadPoolExecutor(16) as pool:
            for data in pool.map(self._store.read, [key for key, _, _ in self._store.list()]):
                for line in data.decode().split("\n"):
                    file = SeenFile.parse(line)
                    known[file.url] = file
        return known

    def add(self, files: Iterable[SeenFile]) -> None:
        """Remember some more; a file with a passing fault is looked into again instead."""
        lasting = (file for file in files if not any(image.error in PASSING for image in file.images))
        lines = "\n".join(file.dump() for file in lasting)
        if lines:
            self._store.write(f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.jsonl", lines.encode())
