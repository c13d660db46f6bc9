"""Many pictures on a cluster: actors with a model each draw small batches."""

from __future__ import annotations

import math
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from gtl.families.source import resolve
from gtl.generate.crew import (
    Batch,
    Crew,
    check_code,
    choose_gpus,
    choose_places,
    naming_machine,
    work_through,
)
from gtl.types import DTYPES, Progress, Sampler, UserError, quiet, sampler_of

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from gtl.families.base import Family
    from gtl.generate.drawing import Drawer
    from gtl.generate.request import Request


class Origin(NamedTuple):
    """Where a base model's files are found."""

    source: str
    revision: str | None = None
    variant: str | None = None


class Published(NamedTuple):
    """An adapter of a registry, which each machine fetches for itself."""

    registry: str
    """Folder or bucket URL."""
    name: str
    """NAME@VERSION."""
    scale: float = 1.0
    sampler: Sampler = "model"
    """That it was taught for."""


@dataclass(frozen=True)
class Model:
    """A base model with adapters on it, by names that lead to the same files on every machine of the cluster."""

    origin: Origin
    fingerprint: str
    """Of the base model, so that no machine draws with another one."""
    adapters: tuple[Published, ...] = ()
    """All active at once."""
    dtype: str = "fp32"
    """Of the weights and the arithmetic: fp32 or bf16."""

    @property
    def sampler(self) -> Sampler:
        """That it is drawn by: an adapter for few steps decides it for all."""
        return sampler_of(adapter.sampler for adapter in self.adapters)


@dataclass(frozen=True)
class Order:
    """One picture to draw."""

    model: Model
    request: Request
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """What its file says beside the request's fields."""


def spread(
    orders: Sequence[Order],
    *,
    workers: int | None = None,
    gpus: int | None = None,
    max_batch: int = 4,
    progress: Progress | None = None,
) -> Generator[tuple[int, bytes], None, None]:
    """Draw on the connected cluster; yields (position in `orders`, PNG file) as they are done, in any order, each once.

    A request's picture is the one that `generate` draws. Sums are rounded in another order where it is drawn in a batch
    of another size, as the last of many and the few of a large crew are; in fp32 that moves a channel by 1 of 255.
    Models are loaded in the order of their first picture, one at a time on each worker. The consumer sets the pace: no
    more is drawn ahead of it than two batches a worker.

    Args:
        orders: What to draw; nothing of it is checked before it is drawn.
        workers: Processes on one GPU or one CPU each; None: as many as are free, have something to do and, on CPUs, fit
            into the memory. Those that find no room yet join when they do.
        gpus: Of each worker, 1 or 0; None: 1 where the cluster has any.
        max_batch: Pictures of a step at most.
        progress: Is called as it goes on.

    Raises:
        UserError: a request, a model or an adapter is wrong, the cluster has too few GPUs or CPUs, or workers die again
            and again.
    """
    if not orders:
        return
    number, gpus = choose_number(workers, gpus, orders, max_batch)
    crew = Crew(Painter, (max_batch,), cut(orders, number, max_batch), number, gpus)
    yield from work_through(crew, "draw", progress or quiet)


def choose_number(workers: int | None, gpus: int | None, orders: Sequence[Order], max_batch: int) -> tuple[int, int]:
    """How many workers, and how many GPUs each of them has: 0 or 1.

    Raises:
        UserError: the cluster can never hold so many.
    """
    import ray

    gpus = choose_gpus() if gpus is None else gpus
    if workers is None:
        largest = 0 if gpus else max(size_of(model) for model in {order.model for order in orders})
        return choose_places(gpus, math.ceil(len(orders) / max_batch), largest), gpus
    kind = "GPU" if gpus else "CPU"
    if workers > (there := ray.cluster_resources().get(kind, 0)):
        raise UserError(f"--workers: {workers}: each takes one {kind}; the cluster has {there:g}")
    return min(workers, len(orders)), gpus


def size_of(model: Model) -> int:
    """About the bytes that drawing with a model takes on a CPU: those of its files, and as many for all else."""
    folder = resolve(*model.origin)
    return 2 * sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def cut(orders: Sequence[Order], workers: int, max_batch: int) -> list[Batch]:
    """Batches of one model each, so small that there is one for every worker; a model's follow one another."""
    size = min(max_batch, math.ceil(len(orders) / workers))
    by_model: dict[Model, list[int]] = {}
    for position, order in enumerate(orders):
        by_model.setdefault(order.model, []).append(position)
    return [
        make_batch(part, [orders[position] for position in part])
        for positions in by_model.values()
        for part in (positions[start : start + size] for start in range(0, len(positions), size))
    ]


def make_batch(positions: list[int], orders: Sequence[Order]) -> Batch:
    """Orders that are drawn together."""
    first = orders[0].request
    return Batch(positions, orders, f"pictures like {first.prompt!r} ({first.width}x{first.height})")


class Painter:
    """Lives as an actor on one device, and keeps the model that it drew with last."""

    def __init__(self, device: str, max_batch: int) -> None:
        """Nothing is loaded before the first batch."""
        self._device, self._max_batch = device, max_batch
        self._lock = threading.Lock()
        self._held: tuple[Model, Drawer] | None = None

    def begin(self, code: str) -> None:
        """See `Member`."""
        check_code(code)

    def work(self, orders: Sequence[Order]) -> list[bytes]:
        """PNG files of one model's orders, in their order.

        Raises:
            UserError: a request, the model or an adapter is wrong; the machine is named.
        """
        from gtl.images import encode_png

        with naming_machine(), self._lock:  # only while it draws: files are written beside the next batch
            images = self._images(orders)
        return [encode_png(images[i], {**asdict(order.request), **order.recipe}) for i, order in enumerate(orders)]

    def _images(self, orders: Sequence[Order]) -> dict[int, Image.Image]:
        model = orders[0].model
        if self._held is None or self._held[0] != model:
            self._held = None  # its memory is needed
            self._held = model, load_engine(model, self._device, self._max_batch)
        from gtl.generate.images import draw

        return dict(draw(self._held[1], [order.request for order in orders]))


def load_engine(model: Model, device: str, max_batch: int) -> Drawer:
    """Find a model's files from this machine and load them.

    Raises:
        UserError: as `open_model`.
    """
    import torch

    from gtl.generate.drawing import open_drawer
    from gtl.generate.images import load_parts

    family, adapters = open_model(model)
    dtype = getattr(torch, DTYPES[model.dtype])
    return open_drawer(family, load_parts(family, adapters, device=device, dtype=dtype), device, dtype, max_batch)


def open_model(model: Model) -> tuple[Family, list[tuple[Path, float]]]:
    """Find a model's files from this machine: its family, and its adapters' folders with their scales.

    Raises:
        UserError: they are not there, or not those that the launcher has.
    """
    from gtl.adapters import Registry
    from gtl.families import open_family

    origin = model.origin
    adapters = [(Registry(adapter.registry).fetch(adapter.name), adapter.scale) for adapter in model.adapters]
    family = open_family(origin.source, revision=origin.revision, variant=origin.variant)
    if (found := family.fingerprint()) != model.fingerprint:
        raise UserError(
            f"model.source: {origin.source}: its files here ({found[:12]}) are not those where work began "
            f"({model.fingerprint[:12]}); give all machines the same model"
        )
    return family, adapters
