"""A prepared dataset: entries, and their tensors in the cache."""

from __future__ import annotations

import copy
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gtl.data.buckets import geometry, variants
from gtl.data.cache import Space, prompt_key
from gtl.storage import Store
from gtl.types import Entry, Item, Original, Record, UserError

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "datasets"
PIXELS = "pixels"
"""Name of a crop's tensor in a space of pixels."""
PIXEL_SPACE = f"images-{PIXELS}-uint8"
"""The space of crops that no codec has encoded: they are the same for every model."""
BYTE_SPACE = "images-identity-uint8"
"""The space of moments of models that have no codec and denoise pixels: their bytes, whatever the dtype."""
NO_SPACE = "images-none"
"""The space of images that are not looked at, of which only captions count: nothing is in it."""


@dataclass(frozen=True)
class Cuts:
    """How many ways there are to cut an image, and the seed of their places."""

    crops: int
    flip: bool
    seed: int


class Dataset:
    """Images with captions, encoded by one model; kept in the cache under a fingerprint of all that is in it."""

    def __init__(self, store: Store, entries: Sequence[Entry], images: str, prompts: str | None, cuts: Cuts) -> None:
        """`store` is the cache's root, `images` and `prompts` name its spaces; no prompts, no conditions."""
        self.entries = list(entries)
        self.images = Space(store, images)
        self.prompts = None if prompts is None else Space(store, prompts)
        self.cuts = cuts
        self._store = store

    @cached_property
    def fingerprint(self) -> str:
        """Hash of images, captions, weights, crops, encoders and of which images are whose; not of places."""
        digest = hashlib.sha256(json.dumps(self._header()).encode())
        for entry in self.entries:
            record = entry.record
            told: list[Any] = [record.sha256, record.captions, record.weight, entry.variants]
            told += filter(None, [record.labels])
            told += ["class"] * record.is_class_image + ["target"] * record.is_target
            told += ["original", record.original.sha256, entry.originals] if record.original else []
            digest.update(json.dumps(told).encode())
        return digest.hexdigest()

    def _header(self) -> dict[str, Any]:
        cuts = {"crops": self.cuts.crops, "flip": self.cuts.flip, "seed": self.cuts.seed}
        prompts = None if self.prompts is None else self.prompts.name
        return {"images": self.images.name, "prompts": prompts, "cuts": cuts}

    def item(self, entry: int, variant: int, caption: int) -> Item:
        """What training reads of one variant of one image with one of its captions."""
        found = self.entries[entry]
        record = found.record
        cut = variants(record.sha256, record.size, found.bucket, **vars(self.cuts))[variant]
        tensors = {} if self.images.name == NO_SPACE else self.images.read(found.variants[variant])
        pixels = tensors.pop(PIXELS, None)
        return Item(
            latents=tensors,
            conditions={} if self.prompts is None else self.prompts.read(prompt_key(record.captions[caption])),
            null_conditions=self._null_conditions,
            geometry=geometry(record.size, found.bucket, cut),
            caption=record.captions[caption] if record.captions else "",
            pixels=pixels,
            is_target=record.is_target,
            original=self.images.read(found.originals[variant]) if found.originals else None,
            labels=record.labels,
        )

    @cached_property
    def _null_conditions(self) -> dict[str, Tensor]:
        return {} if self.prompts is None else self.prompts.read(prompt_key(""))

    def split(self, share: float) -> tuple[Dataset, Dataset]:
        """What is trained on, and the share of the subject's images that is held out, at least one.

        Which ones depends on their bytes, so copies of an image are on one side and few change when images come or go.

        Args:
            share: Of the images, in [0, 1); 0 holds none out. Class images are all trained on.

        Raises:
            UserError: nothing would be left to train on.
        """
        if not share:
            return self, self._part([])
        held_out = choose_held_out((entry.record for entry in self.entries), share)
        sides: tuple[list[Entry], list[Entry]] = [], []
        for entry in self.entries:
            sides[entry.record.sha256 in held_out].append(entry)
        return self._part(sides[0]), self._part(sides[1])

    def _part(self, entries: list[Entry]) -> Dataset:
        part = copy.copy(self)
        part.entries = entries
        return part

    def save(self, prompts: Sequence[str] = ()) -> None:
        """Keep it in the cache, for workers and for later; marks it, and these prompts beside it, as used now."""
        import pyarrow as pa
        from pyarrow import parquet

        key = f"{FOLDER}/{self.fingerprint}"
        if not self._store.exists(f"{key}.parquet"):
            rows = [
                {
                    "uri": e.record.uri, "sha256": e.record.sha256, "size": e.record.size, "weight": e.record.weight,
                    "captions": e.record.captions, "bucket": e.bucket, "variants": e.variants,
                    "is_class_image": e.record.is_class_image, "is_target": e.record.is_target,
                    "labels": e.record.labels,
                    **({"original": vars(e.record.original), "originals": e.originals} if e.record.original else {}),
                }
                for e in self.entries
            ]  # fmt: skip
            table = pa.Table.from_pylist(rows).replace_schema_metadata({"gtl": json.dumps(self._header())})
            sink = io.BytesIO()
            parquet.write_table(table, sink, compression="zstd")
            self._store.write(f"{key}.parquet", sink.getvalue())
        asked = sorted({*prompts, *used_prompts(self._store, self.fingerprint)})
        self._store.write(f"{key}.used", json.dumps(asked).encode())

    @classmethod
    def load(cls, store: Store, fingerprint: str) -> Dataset:
        """Read back what `save` kept in the cache whose root is `store`.

        Raises:
            UserError: it is not in the cache.
        """
        dataset = read(store, fingerprint)
        dataset.refresh()
        return dataset

    def refresh(self) -> None:
        """Learn where its tensors are."""
        self.images.refresh()
        if self.prompts is not None:
            self.prompts.refresh()


def choose_held_out(records: Iterable[Record], share: float) -> set[str]:
    """SHA-256 of the images that `Dataset.split` holds out of these.

    Raises:
        UserError: nothing would be left to train on.
    """
    given = {record.sha256 for record in records if not record.is_class_image}
    ordered = sorted(given, key=lambda sha256: hashlib.sha256(f"validation {sha256}".encode()).digest())
    held_out = set(ordered[: max(1, round(share * len(ordered)))])
    if len(held_out) == len(given):
        raise UserError(f"data.validation: {share:g}: of {len(given)} different images none is left to train on")
    return held_out


def used_prompts(store: Store, fingerprint: str) -> list[str]:
    """The prompts that runs on a dataset have asked for, beside its captions."""
    try:
        prompts: list[str] = json.loads(store.read(f"{FOLDER}/{fingerprint}.used") or b"[]")
    except FileNotFoundError:
        return []
    return prompts


def read(store: Store, fingerprint: str) -> Dataset:
    """The dataset without the places of its tensors.

    Raises:
        UserError: it is not in the cache.
    """
    from pyarrow import parquet

    key = f"{FOLDER}/{fingerprint}.parquet"
    try:
        data = store.read(key)
    except FileNotFoundError:
        raise UserError(f"storage.cache: {store.url(key)}: not there; `gtl cache RECIPE` makes it again") from None
    table = parquet.read_table(io.BytesIO(data))
    header = json.loads(table.schema.metadata[b"gtl"])
    entries = [
        Entry(
            Record(
                row["uri"], row["sha256"], tuple(row["size"]), tuple(row["captions"]), row["weight"],
                # Unknown to datasets that older versions saved.
                row.get("is_class_image", False), row.get("is_target", False),
                Original(**row["original"]) if row.get("original") else None, row.get("labels", ""),
            ),
            tuple(row["bucket"]),
            tuple(row["variants"]),
            tuple(row.get("originals") or ()),
        )
        for row in table.to_pylist()
    ]
    return Dataset(store, entries, header["images"], header["prompts"], Cuts(**header["cuts"]))
