"""Encoding what the cache lacks, by a pool of actors that hold the encoders."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gtl.data.buckets import Size, Variant, cut
from gtl.data.cache import SHARD_BYTES, Space
from gtl.data.containers import Place, fetch
from gtl.data.dataset import PIXEL_SPACE, PIXELS
from gtl.data.index import CHANGED, GONE
from gtl.data.spread import spread
from gtl.data.stream import MISTAKE, pack, run_actors, unpack
from gtl.families import encoding
from gtl.images import BrokenImage, decode
from gtl.storage import Store
from gtl.types import DTYPES, UserError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn

    from gtl.families.base import Family

ROWS_PER_CALL = 256
"""Images or captions that an actor gets at a time, at most."""
FLUSH_SECONDS = 30.0
"""What was encoded longer ago than this is on disk."""
BATCH_PIXELS = 2**21
"""Of one forward pass of the codec: eight images of 512x512."""
PROMPT_BATCH = 32
DECODERS = 4
"""Threads of an actor that read and decode."""

Result = dict[str, str]
"""`uri` of an image (or key of a caption) that is through, and its `error`, empty if it went well."""
Encoded = tuple[dict[str, dict[str, "Tensor"]], list[Result]]
"""Tensors by cache key, and what they settle."""


@dataclass(frozen=True)
class ImageWork:
    """An image of which variants are missing."""

    uri: str
    sha256: str
    place: Place
    bucket: Size
    variants: dict[str, Variant]
    """By cache key."""


@dataclass
class Pending:
    """Encoded and not yet on disk."""

    items: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    bytes: int = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Take in the tensors of a key."""
        self.items[key] = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        self.bytes += sum(tensor.nbytes for tensor in self.items[key].values())

    @property
    def is_due(self) -> bool:
        """Whether it is much, or old."""
        return self.bytes >= SHARD_BYTES or time.monotonic() - self.since >= FLUSH_SECONDS


def fill(
    family: Family, images: Space, prompts: Space | None, cache: Store, dtype: str,
    work: Sequence[ImageWork], captions: Mapping[str, str], progress: Callable[[int, int], None], gpus: int = 1,
) -> dict[str, str]:  # fmt: skip
    """Encode images and captions (by cache key) into the spaces; broken images by URI with the reason.

    What is on disk when this ends early, for whatever reason, is not encoded again. Each actor has so many `gpus`,
    where there are any.

    Raises:
        UserError: the cache is full or out of reach, the model's files are wrong, or there are fewer GPUs.
    """
    rows = [{"caption": text, "key": key} for key, text in captions.items()]
    rows += [vars(item) for item in work]
    if not rows:
        return {}
    from gtl.session import session

    failed: dict[str, str] = {}
    with session() as cluster:
        if cluster.gpus and cluster.gpus_of_a_node < gpus:
            raise UserError(f"data.gpus_per_encoder: {gpus}: no machine has more than {cluster.gpus_of_a_node:g} GPUs")
        slots = max(1, int(cluster.gpus // gpus or cluster.cpus))
        calls = max(-(-len(rows) // ROWS_PER_CALL), min(slots, -(-len(rows) // 16)))
        results = run_actors(
            rows, Encoder, (family, cache, images.name, None if prompts is None else prompts.name, dtype),
            calls=calls, actors=min(slots, calls), gpus=gpus if cluster.gpus else 0,
        )  # fmt: skip
        for done, result in enumerate(results, 1):
            if result["error"]:
                failed[result["uri"]] = result["error"]
            progress(done, len(rows))
    return failed


class Encoder:
    """The actor: loads a part of the model when the first work for it comes, encodes, writes shards."""

    def __init__(self, family: Family, cache: Store, images: str, prompts: str | None, dtype: str) -> None:
        """Cheap: no weight is read."""
        import torch

        self._family = family
        self._images, self._prompts = Space(cache, images), Space(cache, prompts) if prompts else None
        self._dtype: torch.dtype = getattr(torch, DTYPES[dtype])
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._parts: dict[str, nn.Module] = {}

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        """Encode a batch of work; yields the results of what has reached the disk."""
        rows = unpack(batch)
        prompts = [row for row in rows if "caption" in row]
        images = [_image_work(row) for row in rows if "caption" not in row]
        try:
            if self._prompts is not None:
                yield from map(pack, self._store(self._prompt_batches(prompts), self._prompts))
            yield from map(pack, self._store(self._image_batches(images), self._images))
        except UserError as error:
            yield pack([{MISTAKE: str(error)}])

    def _store(self, batches: Iterator[Encoded], space: Space) -> Iterator[list[Result]]:
        """Results, whenever a shard has been written."""
        pending = Pending()
        for items, results in batches:
            for key, tensors in items.items():
                pending.add(key, tensors)
            pending.results += results
            if pending.is_due and pending.items:
                space.write(pending.items)
                yield pending.results
                pending = Pending()
        if pending.items:
            space.write(pending.items)
        if pending.results:
            yield pending.results

    def _part(self, name: str) -> nn.Module:
        if name not in self._parts:
            part = self._family.load(name, self._dtype)
            is_spread = self._device == "cuda" and name in self._family.encoders
            self._parts[name] = spread(part) if is_spread else part.to(self._device)
        return self._parts[name]

    def _prompt_batches(self, rows: list[dict[str, str]]) -> Iterator[Encoded]:
        import torch

        for i in range(0, len(rows), PROMPT_BATCH):
            chunk = rows[i : i + PROMPT_BATCH]
            encoders = {name: self._part(name) for name in self._family.encoders}
            with torch.inference_mode():
                found = encoding(self._family).encode_prompts(encoders, [row["caption"] for row in chunk])
            items = {row["key"]: conditions for row, conditions in zip(chunk, found, strict=True)}
            yield items, [{"uri": row["key"], "error": ""} for row in chunk]

    def _image_batches(self, works: list[ImageWork]) -> Iterator[Encoded]:
        if works:
            # Prompts come first in every run's work, so the encoders have done theirs.
            for name in self._family.encoders:
                self._parts.pop(name, None)
            gc.collect()  # the hooks of one that is spread refer to it in circles
        works = sorted(works, key=lambda work: (work.bucket, work.place))
        with ThreadPoolExecutor(DECODERS) as pool:
            for chunk in _chunks(works):
                keys: list[str] = []
                crops: list[Image] = []
                results: list[Result] = []
                for work, (found, error) in zip(chunk, pool.map(load_crops, chunk), strict=True):
                    keys += found
                    crops += found.values()
                    results.append({"uri": work.uri, "error": error})
                yield self._encode_crops(keys, crops), results

    def _encode_crops(self, keys: list[str], crops: list[Image]) -> dict[str, dict[str, Tensor]]:
        import torch

        if not crops:
            return {}
        if self._images.name == PIXEL_SPACE:
            return {key: {PIXELS: crop} for key, crop in zip(keys, to_bytes(crops), strict=True)}
        pixels = to_pixels(crops).to(self._device, self._dtype)
        codec = None if self._family.codec is None else self._part(self._family.codec)
        with torch.inference_mode():
            moments = encoding(self._family).encode_images(codec, pixels)
        # Cloned: a view of one sample would be saved with the whole batch's memory.
        return {key: {name: t[i].clone() for name, t in moments.items()} for i, key in enumerate(keys)}


def _image_work(row: dict[str, Any]) -> ImageWork:
    variants = {key: Variant(*value) for key, value in row["variants"].items()}
    return ImageWork(row["uri"], row["sha256"], Place(*row["place"]), tuple(row["bucket"]), variants)


def _chunks(works: list[ImageWork]) -> Iterator[list[ImageWork]]:
    """Works of one bucket that together fill a forward pass."""
    chunk: list[ImageWork] = []
    for work in works:
        pixels = work.bucket[0] * work.bucket[1]
        full = sum(len(w.variants) for w in chunk) + len(work.variants) > max(1, BATCH_PIXELS // pixels)
        if chunk and (full or chunk[0].bucket != work.bucket):
            yield chunk
            chunk = []
        chunk.append(work)
    if chunk:
        yield chunk


def load_crops(work: ImageWork) -> tuple[dict[str, Image], str]:
    """The image's crops by cache key, or none and the reason why it is broken."""
    try:
        data = fetch(work.place)
        if hashlib.sha256(data).hexdigest() != work.sha256:
            return {}, CHANGED
        image = decode(data)
    except FileNotFoundError:
        return {}, GONE
    except BrokenImage as error:
        return {}, str(error)
    return {key: cut(image, work.bucket, variant) for key, variant in work.variants.items()}, ""


def to_bytes(images: Sequence[Image]) -> torch.Tensor:
    """RGB images of one size as uint8 [B, 3, H, W]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def to_pixels(images: Sequence[Image]) -> torch.Tensor:
    """RGB images of one size as [B, 3, H, W] in [-1, 1]."""
    return to_bytes(images).float().div(127.5).sub(1)
