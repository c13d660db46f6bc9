"""Images as metrics look at them: their centre squares, cut as for training, none of them encoded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gtl.config.recipe import Data
from gtl.data.buckets import Size, bucket_sizes, variant_key, variants
from gtl.data.dataset import PIXEL_SPACE, Cuts, Dataset
from gtl.data.fill import ImageWork
from gtl.data.labels import check_labels
from gtl.data.prepare import check_usable, make_entry, name_broken, scan_all
from gtl.families import seeing
from gtl.storage import Store
from gtl.types import Progress, quiet

if TYPE_CHECKING:
    from gtl.families.base import Family


@dataclass(frozen=True)
class Reference:
    """The images of a recipe's data, each once, without class images."""

    size: Size
    """(height, width) of all squares, in pixels."""
    trained: tuple[ImageWork, ...]
    """Those that are trained on, in the order of their hashes, which is as good as a shuffled one."""
    held_out: tuple[ImageWork, ...]
    """Those that `data.validation` keeps from training."""
    captions: tuple[str, ...]
    """All captions of all of them, image by image, held-out ones first; the empty one where the model reads none."""

    @property
    def number(self) -> int:
        """Of all of them."""
        return len(self.trained) + len(self.held_out)

    @property
    def fingerprint(self) -> str:
        """Hash of the squares and of which are held out."""
        sides = [keys_of(self.trained), keys_of(self.held_out)]
        return hashlib.sha256(json.dumps(sides).encode()).hexdigest()


def reference(data: Data, family: Family, cache_url: str, progress: Progress = quiet) -> Reference:
    """Find the images; an unchanged source costs a listing.

    Args:
        data: The recipe's section.
        family: The opened model, which says what sizes it takes.
        cache_url: Root of the cache, which remembers what was found in files.
        progress: Is called as it goes on.

    Raises:
        UserError: a source or a caption is not what it has to be, or too many images are broken.
    """
    cache = Store(cache_url)
    tasks = seeing(family).tasks if family.heads else {}
    columns = {task.column for task in tasks.values()}
    found = scan_all(data, cache, None, progress, columns=columns, reads=bool(family.encoders))
    if tasks:
        check_labels(found, tasks)
    check_usable(found, data)
    name_broken(found.broken)
    (size,) = bucket_sizes(data.resolution, family.multiple, 1.0, family.max_size)
    cuts = Cuts(1, False, data.seed)
    places = {located.record.sha256: located.place for located in found.images}
    whole = Dataset(cache, [make_entry(located, (size,), cuts) for located in found.images], PIXEL_SPACE, None, cuts)
    trained, held_out = whole.split(data.validation)

    def works(side: Dataset) -> tuple[ImageWork, ...]:
        records = {entry.record.sha256: entry.record for entry in side.entries}
        return tuple(
            ImageWork(record.uri, sha256, places[sha256], size, {
                variant_key(sha256, size, variant): variant
                for variant in variants(sha256, record.size, size, **vars(cuts))
            })
            for sha256, record in sorted(records.items())
        )  # fmt: skip

    captions = captions_of(held_out, trained) if family.encoders else ("",)
    return Reference(size, works(trained), works(held_out), captions)


def captions_of(*sides: Dataset) -> tuple[str, ...]:
    """Every image's captions, in the order of the images' hashes."""
    found: list[str] = []
    for side in sides:
        records = {entry.record.sha256: entry.record for entry in side.entries}
        found += (caption for _, record in sorted(records.items()) for caption in record.captions)
    return tuple(found)


def keys_of(works: Sequence[ImageWork]) -> list[str]:
    """Of each square, what its features are kept by: it depends on the image's bytes and the cut."""
    return [next(iter(work.variants)) for work in works]
