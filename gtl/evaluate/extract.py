"""Features of pictures and texts, computed where the GPUs are, and of real images only once."""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from gtl.backbones import open_backbone
from gtl.backbones.base import TextBackbone
from gtl.backbones.features import features_of
from gtl.data.fill import ImageWork, load_crops
from gtl.data.reference import keys_of
from gtl.generate.crew import (
    Batch,
    Crew,
    check_code,
    choose_gpus,
    choose_places,
    naming_machine,
    work_through,
)
from gtl.images import BrokenImage, decode
from gtl.storage import Store
from gtl.types import Progress, UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from gtl.backbones.base import Backbone

CHUNK = 256
"""Pictures that an actor looks at before it says something."""
CHUNKS_OF_A_CPU = 4
"""So much work is worth a further actor on a CPU, which takes seconds to start."""
MEMORY = 2**32
"""Bytes that one takes there, about."""


class Drawn(NamedTuple):
    """A picture in a folder."""

    folder: str
    """Its URL."""
    key: str


Item = ImageWork | Drawn | str
"""Something that has features: a real image's square, a picture or a text."""


@dataclass(frozen=True)
class Facts:
    """What a number computed from features has to name."""

    extractor: str
    resize: str
    dtype: str = "fp32"


class Row(NamedTuple):
    """What a backbone makes of an item."""

    features: Tensor
    """[D]"""
    logits: Tensor | None
    """[C] of a classifier."""
    facts: Facts
    """Of the backbone."""


class Rows(NamedTuple):
    """Of items in their order."""

    features: Tensor
    """[N, D]"""
    logits: Tensor | None
    """[N, C] of a classifier."""


class Examiner:
    """Lives as an actor with one backbone."""

    def __init__(self, device: str, spec: str, cache: Store) -> None:
        """`cache` is its root. A mistake of the user's is raised by the first call: here Ray would wrap it."""
        self._device, self._spec, self._cache = device, spec, cache
        self._lock = threading.Lock()

    @cached_property
    def _backbone(self) -> Any:
        return open_backbone(self._spec).to(self._device)

    def begin(self, code: str) -> None:
        """See `Member`."""
        check_code(code)

    def work(self, items: Sequence[Item]) -> list[Row]:
        """Of items of one kind.

        Raises:
            UserError: a backbone is not what it has to be, or an image is gone or broken.
        """
        with naming_machine(), self._lock:
            features, logits = self._rows(items)
            facts = Facts(self._backbone.name, self._backbone.resize)
        classes = [None] * len(features) if logits is None else logits
        rows = zip(features, classes, strict=True)
        return [Row(row.clone(), None if of is None else of.clone(), facts) for row, of in rows]

    def _rows(self, items: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
        if isinstance(items[0], str):
            return encode_texts(self._backbone, items), None
        if isinstance(items[0], ImageWork):
            return features_of(self._backbone, keys_of(items), lambda at: load_square(items[at]), self._cache)
        drawn: tuple[Tensor, Tensor | None] = self._backbone([load_drawn(item) for item in items])
        return drawn


def examine(
    spec: str, cache: Store, sets: Mapping[str, Sequence[Item]], progress: Progress
) -> tuple[dict[str, Rows], Facts]:
    """What a backbone makes of sets of items, on the connected cluster; what is in several is looked at once.

    Args:
        spec: Names the backbone; see `open_backbone`.
        cache: Its root, which keeps features of real images.
        sets: By any name, each of one kind; not all of them empty.
        progress: Is called as it goes on.

    Raises:
        UserError: a backbone is not what it has to be, an image is gone or broken, or workers die again and again.
    """
    import torch

    at: dict[Hashable, int] = {}
    distinct: list[Item] = []
    batches: list[Batch] = []
    for items in sets.values():
        new = {name: item for item in items if (name := identity(item)) not in at}
        first = len(distinct)
        distinct += new.values()
        at |= {name: first + turn for turn, name in enumerate(new)}
        for start in range(first, len(distinct), CHUNK):
            positions = range(start, min(start + CHUNK, len(distinct)))
            batches.append(Batch(list(positions), [distinct[i] for i in positions], f"what {spec} looks at"))
    gpus = choose_gpus()
    most = len(batches) if gpus else math.ceil(len(batches) / CHUNKS_OF_A_CPU)
    crew = Crew(Examiner, (spec, cache), batches, choose_places(gpus, most, MEMORY), gpus)
    rows: dict[int, Row] = dict(work_through(crew, "features", progress))

    def collect(items: Sequence[Item]) -> Rows:
        mine = [rows[at[identity(item)]] for item in items]
        logits = [row.logits for row in mine if row.logits is not None]
        return Rows(torch.stack([row.features for row in mine]), torch.stack(logits) if logits else None)

    return {name: collect(items) for name, items in sets.items()}, rows[0].facts


def identity(item: Item) -> Hashable:
    """What two items that have the same features have in common."""
    return keys_of([item])[0] if isinstance(item, ImageWork) else item


def encode_texts(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    """Features [N, D] of texts.

    Raises:
        UserError: the backbone reads none.
    """
    if not isinstance(backbone, TextBackbone):
        raise UserError(f"evaluate.clip: {backbone.name}: reads no text; expected a CLIP model")
    return backbone.encode_texts(texts)


def load_drawn(item: Drawn) -> Image:
    """A sample.

    Raises:
        UserError: its file is gone or damaged.
    """
    folder = Store(item.folder)
    try:
        return decode(folder.read(item.key))
    except BrokenImage as error:
        raise UserError(f"{folder.url(item.key)}: damaged ({error}); remove it, and it is drawn again") from error


def load_square(work: ImageWork) -> Image:
    """A real image as metrics look at it.

    Raises:
        UserError: it is gone or broken.
    """
    crops, error = load_crops(work)
    if error:
        raise UserError(f"{work.uri}: {error}")
    return next(iter(crops.values()))
