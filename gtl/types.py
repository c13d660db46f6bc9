"""Nouns that travel between rooms. Importing this module never imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""A recipe's dtypes, by the names that torch gives them."""


Sampler = Literal["model", "lcm"]
"""model: the sampler that a model was published with. lcm: that of consistency models, for few steps (Luo et al. 2023,
arXiv 2310.04378)."""
STEPS: dict[Sampler, int] = {"model": 25, "lcm": 4}
"""Denoising steps of a picture where nobody says."""
GUIDANCE: dict[Sampler, float] = {"model": 7.5, "lcm": 1.0}
"""Scale of its classifier-free guidance where nobody says. What draws in few steps was taught with guidance."""


def sampler_of(adapters: Iterable[Sampler]) -> Sampler:
    """What draws with several adapters: one for few steps decides it for all."""
    return "lcm" if "lcm" in adapters else "model"


class UserError(ValueError):
    """A mistake of the user's. The message is one line: the key or file, what was found, what would be right.

    The command line prints it without a traceback and exits with status 2.
    """


class Progress(Protocol):
    """Shows how far long work is."""

    def __call__(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """`done` of `total` (0: unknown) of a phase is through."""
        ...


def quiet(phase: str, done: int, total: int, detail: str = "") -> None:
    """Progress that nobody watches."""


class Losses(NamedTuple):
    """What a player's forward returns.

    `total` is this micro-batch's share of the global mean: sum over its samples of weight * loss, a scalar that
    carries the gradient. `parts` are detached scalars to report, shares of the global mean like `total`. Of a batch of
    several runs all of these are [runs].
    """

    total: Tensor
    parts: dict[str, Tensor]
    outcomes: Mapping[str, Tensor] = {}
    """In evaluation: what came of each sample, [B, ...], that metrics are made of; see `gtl.evaluate.outcomes`."""


@dataclass(frozen=True)
class Geometry:
    """How an image became its training crop. All sizes are (height, width) in pixels."""

    original: tuple[int, int]
    crop: tuple[int, int]
    """Top and left of the crop, after the resize."""
    target: tuple[int, int]


@dataclass(frozen=True)
class Original:
    """The image that another one is an edit of."""

    uri: str
    sha256: str
    """Of the file's bytes."""


@dataclass(frozen=True)
class Task:
    """What a head says of a picture."""

    column: str
    """Of the data, that has the truth: of a metadata file or table; `folder`, the name of the image's folder; or
    `caption`, its first caption."""
    kind: Literal["class", "boxes"]
    """boxes: which objects are in the picture, and where."""
    values: tuple[str, ...]
    """What there is, in the order of the head's outputs."""


@dataclass(frozen=True)
class Record:
    """One image of a data source, before encoding."""

    uri: str
    sha256: str
    """Of the file's bytes."""
    size: tuple[int, int]
    """(height, width) after EXIF orientation."""
    captions: tuple[str, ...]
    weight: float = 1.0
    """Weight of its loss: 1, or the weight of its source or of the prior."""
    is_class_image: bool = False
    """Drawn by the base model for prior preservation; the others are the subject."""
    is_target: bool = False
    """Of the domain that objective.type: align adapts to."""
    original: Original | None = None
    """Of the same size; None where it is no edit, or nobody asks what of. Its caption is then the instruction."""
    labels: str = ""
    """What heads learn to say of it: a JSON object of columns; empty where nothing reads them."""


@dataclass(frozen=True)
class Entry:
    """One image of a prepared dataset: a record with its bucket and its cached variants."""

    record: Record
    bucket: tuple[int, int]
    """(height, width) of the training crop in pixels."""
    variants: tuple[str, ...]
    """Cache key of every crop / flip variant; at least one."""
    originals: tuple[str, ...] = ()
    """Of the same crops of the image that it is an edit of; () without one."""


class PlanItem(NamedTuple):
    """One place in a global batch."""

    entry: int
    """Position in the dataset's entries."""
    variant: int
    caption: int
    weight: float
    """Share of the global mean; 0 for a repeat that only fills the shape. A batch of ones sums to 1."""


@dataclass(frozen=True)
class Item:
    """What training reads of one image variant with one caption; tensors without a batch dimension."""

    latents: dict[str, Tensor]
    """The codec's moments: mean and, of most codecs, logvar, each [C, h, w]; features where they are what is trained
    on; {} where pixels are."""
    conditions: dict[str, Tensor]
    """The caption's embeddings; {} where the text encoders run in training, or read nothing."""
    null_conditions: dict[str, Tensor]
    """The empty caption's embeddings, for caption dropout and guidance."""
    geometry: Geometry
    caption: str = ""
    pixels: Tensor | None = None
    """The crop itself, uint8 [3, H, W], where pixels are trained on."""
    is_target: bool = False
    """See `Record`."""
    original: dict[str, Tensor] | None = None
    """The codec's moments of the image that it is an edit of, where edits are learned."""
    labels: str = ""
    """See `Record`."""


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch.

    `tensors` are stacked over samples ([B, ...]); `weight` [B] sums to 1 over the GLOBAL batch. Where several runs
    share a forward pass it is [runs, B], and a row is zero at the samples of others.
    """

    tensors: dict[str, Tensor]
    weight: Tensor
    keys: tuple[str, ...] = field(default=())

    def share(self, losses: Tensor) -> Tensor:
        """Of losses [B] the sum of weight * loss, [] or [runs]; what has no weight is left out, also if not finite."""
        return (self.weight * losses).masked_fill(self.weight == 0, 0.0).sum(-1)

    def pin(self) -> Batch:
        """The same batch in memory that a GPU reads by itself: from any other `to` waits for all that it still does."""
        pinned = {name: value.pin_memory() for name, value in self.tensors.items()}
        return Batch(pinned, self.weight.pin_memory(), self.keys)

    def to(self, device: object) -> Batch:
        """The same batch on another device."""
        moved = {name: value.to(device, non_blocking=True) for name, value in self.tensors.items()}  # type: ignore[call-overload]
        return Batch(moved, self.weight.to(device, non_blocking=True), self.keys)  # type: ignore[call-overload]
