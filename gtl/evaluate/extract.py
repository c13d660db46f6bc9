"""Features of pictures, computed by one actor where the GPUs are, and of real images only once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gtl.backbones import open_backbone
from gtl.backbones.base import TextBackbone
from gtl.backbones.features import features_of
from gtl.data.fill import ImageWork, load_crops
from gtl.data.reference import keys_of
from gtl.images import decode
from gtl.session import get
from gtl.storage import Store
from gtl.types import Progress, UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from gtl.backbones.base import Backbone

CHUNK = 256
"""Pictures of one call: few enough for progress."""

Rows = tuple["Tensor", "Tensor | None"]
"""Features [N, D] and, of a classifier, logits [N, C]."""


@dataclass(frozen=True)
class Facts:
    """What a number computed from features has to name."""

    extractor: str
    resize: str
    dtype: str = "fp32"


class Examiner:
    """Lives as an actor with one backbone."""

    def __init__(self, spec: str, device: str, cache: Store) -> None:
        """`cache` is its root. A mistake of the user's is raised by the first call: here Ray would wrap it."""
        self._spec, self._device, self._cache = spec, device, cache

    @cached_property
    def _backbone(self) -> Any:
        return open_backbone(self._spec).to(self._device)

    def facts(self) -> Facts:
        """Of the backbone."""
        return Facts(self._backbone.name, self._backbone.resize)

    def real(self, works: Sequence[ImageWork]) -> Rows:
        """Of real images' squares.

        Raises:
            UserError: an image is gone or broken.
        """
        return features_of(self._backbone, keys_of(works), lambda position: load_square(works[position]), self._cache)

    def drawn(self, folder: Store, keys: Sequence[str]) -> Rows:
        """Of pictures in a folder."""
        rows: Rows = self._backbone([decode(folder.read(key)) for key in keys])
        return rows

    def texts(self, texts: Sequence[str]) -> Tensor:
        """See `encode_texts`."""
        return encode_texts(self._backbone, texts)


@contextmanager
def examine(spec: str, cache: Store) -> Iterator[Features]:
    """The features of a backbone, computed on the connected cluster."""
    import ray

    gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    make: Any = ray.remote(num_cpus=1, num_gpus=gpus)(Examiner)
    actor = make.remote(spec, "cuda" if gpus else "cpu", cache)
    try:
        yield Features(actor)
    finally:
        ray.kill(actor)


class Features:
    """An actor's, asked for in pieces."""

    def __init__(self, actor: Any) -> None:
        """The actor is an `Examiner`."""
        self._actor = actor

    def facts(self) -> Facts:
        """See `Examiner`."""
        found: Facts = get(self._actor.facts.remote())
        return found

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features [N, D] of texts; each distinct one is computed once."""
        import torch

        distinct = list(dict.fromkeys(texts))
        parts = [get(self._actor.texts.remote(piece)) for piece in pieces(distinct)]
        at = {text: position for position, text in enumerate(distinct)}
        return torch.cat(parts)[[at[text] for text in texts]]

    def real(self, works: Sequence[ImageWork], progress: Progress) -> Rows:
        """Of real images' squares, with progress."""
        return self._collect([self._actor.real.remote(piece) for piece in pieces(works)], len(works), progress)

    def drawn(self, folder: Store, keys: Sequence[str], progress: Progress) -> Rows:
        """Of pictures in a folder, with progress."""
        return self._collect([self._actor.drawn.remote(folder, piece) for piece in pieces(keys)], len(keys), progress)

    def _collect(self, calls: Sequence[Any], total: int, progress: Progress) -> Rows:
        import torch

        parts: list[Rows] = []
        for call in calls:
            progress("features", sum(len(rows) for rows, _ in parts), total)
            parts.append(get(call))
        progress("features", total, total)
        logits = [part for _, part in parts if part is not None]
        return torch.cat([rows for rows, _ in parts]), torch.cat(logits) if logits else None


def encode_texts(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    """Features [N, D] of texts.

    Raises:
        UserError: the backbone reads none.
    """
    if not isinstance(backbone, TextBackbone):
        raise UserError(f"evaluate.clip: {backbone.name}: reads no text; expected a CLIP model")
    return backbone.encode_texts(texts)


def load_square(work: ImageWork) -> Image:
    """A real image as metrics look at it.

    Raises:
        UserError: it is gone or broken.
    """
    crops, error = load_crops(work)
    if error:
        raise UserError(f"{work.uri}: {error}")
    return next(iter(crops.values()))


def pieces(rows: Sequence[Any]) -> list[Sequence[Any]]:
    """What one call takes at a time."""
    return [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
