"""Many pictures on a cluster: actors with a model each draw small batches, also those that another was lost with.

Ray could start a lost actor again and repeat its calls (`max_restarts`, `max_task_retries`), but they stay that
actor's: where its machine is gone and there is no room for another they wait for ever, however idle the others are.
`ray.util.ActorPool` gives an actor one call at a time and forgets the call that it died over. So calls are handed out
here, and a lost actor's go to whoever is free.
"""

from __future__ import annotations

import math
import platform
import threading
from collections import Counter, deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from gtl import __version__
from gtl.families.source import resolve
from gtl.session import get
from gtl.types import DTYPES, Progress, UserError, quiet

if TYPE_CHECKING:
    from PIL import Image

    from gtl.generate.engine import Engine, Request

AHEAD = 2
"""Batches that an actor has at most: while one is drawn the next is there, and the files of the last are written."""
MOST_LOSSES = 3
"""So often a batch may be lost with the actor that has it: what kills three is the batch."""
LOOK_S = 1.0
"""Between two looks at the progress while nothing is done."""


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


@dataclass(frozen=True)
class Order:
    """One picture to draw."""

    model: Model
    request: Request
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """What its file says beside the request's fields."""


@dataclass(eq=False)
class Batch:
    """Orders of one model, drawn together."""

    positions: list[int]
    orders: list[Order]
    losses: int = 0
    """Actors that were lost with it."""


class Call(NamedTuple):
    """Something an actor was asked for; None: whether it has begun to work."""

    worker: Any
    batch: Batch | None


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
    show, done = progress or quiet, 0
    with closing(Crew(cut(orders, number, max_batch), number, gpus, max_batch)) as crew:
        show("draw", done, len(orders), crew.state)
        while done < len(orders):
            for position, png in crew.wait():
                done += 1
                show("draw", done, len(orders), crew.state)
                yield position, png
            if done < len(orders):
                show("draw", done, len(orders), crew.state)


def choose_number(workers: int | None, gpus: int | None, orders: Sequence[Order], max_batch: int) -> tuple[int, int]:
    """How many workers, and how many GPUs each of them has: 0 or 1.

    Raises:
        UserError: the cluster can never hold so many.
    """
    import ray

    there, free = ray.cluster_resources(), ray.available_resources()
    if gpus is None:
        gpus = int(there.get("GPU", 0) > 0)
    kind = "GPU" if gpus else "CPU"
    if workers is None:
        places = min(int(free.get(kind, 0)), math.ceil(len(orders) / max_batch))
        if not gpus:  # where there may be many more than models fit into the memory
            largest = max(size_of(model) for model in {order.model for order in orders})
            places = min(places, int(free.get("memory", 0) // largest))
        return max(1, places), gpus
    if workers > there.get(kind, 0):
        raise UserError(f"--workers: {workers}: each takes one {kind}; the cluster has {there.get(kind, 0):g}")
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
        Batch(part, [orders[position] for position in part])
        for positions in by_model.values()
        for part in (positions[start : start + size] for start in range(0, len(positions), size))
    ]


class Crew:
    """The actors, and who of them has which batch."""

    def __init__(self, batches: Sequence[Batch], number: int, gpus: int, max_batch: int) -> None:
        """Ask the cluster for the actors; it may take its time."""
        import ray

        self._make: Any = ray.remote(num_cpus=1, num_gpus=gpus)(Painter).options(max_concurrency=AHEAD)
        self._arguments = "cuda" if gpus else "cpu", max_batch
        self._waiting = deque(batches)
        self._calls: dict[Any, Call] = {}
        self._at_work: list[Any] = []
        """Those that have begun."""
        self._number, self._died = number, 0
        """Of actors; how many died since a batch was last done."""
        for _ in range(number):
            self._start()

    @property
    def state(self) -> str:
        """Who is at work, for people."""
        return f"{len(self._at_work)} of {self._number} workers"

    def wait(self) -> list[tuple[int, bytes]]:
        """What is done next, by position; nothing if that takes long or something else happened.

        Raises:
            UserError: an actor met a mistake of the user's, or actors die again and again.
        """
        import ray

        self._feed()
        ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=LOOK_S)
        if not ready:
            return []
        worker, batch = self._calls[ready[0]]
        try:
            files = get(ready[0])
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.OutOfMemoryError) as error:
            if isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed:
                raise  # it would fail everywhere
            self._replace(worker, error)
            return []
        del self._calls[ready[0]]
        if batch is None:
            self._at_work.append(worker)
            return []
        self._died = 0
        return list(zip(batch.positions, files, strict=True))

    def close(self) -> None:
        """End the actors at once."""
        import ray

        for worker in {*self._at_work, *(call.worker for call in self._calls.values())}:
            ray.kill(worker)

    def _start(self) -> None:
        worker = self._make.remote(*self._arguments)
        self._calls[worker.begin.remote(__version__)] = Call(worker, None)

    def _feed(self) -> None:
        """Give everybody a batch, then a second one, but none that somebody without any could begin with at once."""
        has = Counter(call.worker for call in self._calls.values() if call.batch is not None)
        for depth in range(AHEAD):
            for worker in self._at_work:
                idle = self._number - len(has)
                if len(self._waiting) <= (idle if depth else 0):
                    return
                if has[worker] == depth:
                    batch = self._waiting.popleft()
                    self._calls[worker.draw.remote(batch.orders)] = Call(worker, batch)
                    has[worker] += 1

    def _replace(self, worker: Any, error: Exception) -> None:
        """Take back what a lost actor has and ask for another one."""
        import ray

        lost = [call.batch for call in self._calls.values() if call.worker is worker and call.batch is not None]
        self._calls = {reference: call for reference, call in self._calls.items() if call.worker is not worker}
        self._at_work = [other for other in self._at_work if other is not worker]
        self._waiting.extendleft(reversed(lost))
        ray.kill(worker)  # one that was only out of reach still holds its GPU
        self._died += 1
        for batch in lost:
            batch.losses += 1
            if batch.losses >= MOST_LOSSES:
                first = batch.orders[0].request
                raise UserError(
                    f"{batch.losses} workers died over pictures like {first.prompt!r} ({first.width}x{first.height}): "
                    f"{reason(error)}"
                )
        if self._died >= MOST_LOSSES * self._number:
            raise UserError(f"{self._died} workers died before any drew a picture: {reason(error)}")
        self._start()


def reason(error: Exception) -> str:
    """Ray's reason on one line, without what it is usually."""
    return " ".join(str(error).splitlines()[-1].partition(" Some common causes")[0].split())[:300]


class Painter:
    """Lives as an actor on one device, and keeps the model that it drew with last."""

    def __init__(self, device: str, max_batch: int) -> None:
        """Nothing is loaded before the first batch."""
        self._device, self._max_batch = device, max_batch
        self._lock = threading.Lock()
        self._held: tuple[Model, Engine] | None = None

    def begin(self, code: str) -> None:
        """Answer as soon as there is a place for the actor.

        Raises:
            UserError: this machine has another version of gtl.
        """
        if code != __version__:
            raise UserError(f"gtl {__version__} on {platform.node()}, {code} where drawing began; install one version")

    def draw(self, orders: Sequence[Order]) -> list[bytes]:
        """PNG files of one model's orders, in their order.

        Raises:
            UserError: a request, the model or an adapter is wrong; the machine is named.
        """
        from gtl.images import encode_png

        try:
            with self._lock:  # only while it draws: files are written beside the next batch
                images = self._images(orders)
        except UserError as error:
            raise UserError(f"{error} (a worker on {platform.node()})") from None
        return [encode_png(images[i], {**asdict(order.request), **order.recipe}) for i, order in enumerate(orders)]

    def _images(self, orders: Sequence[Order]) -> dict[int, Image.Image]:
        model = orders[0].model
        if self._held is None or self._held[0] != model:
            self._held = None  # its memory is needed
            self._held = model, load_engine(model, self._device, self._max_batch)
        from gtl.generate.images import draw

        return dict(draw(self._held[1], [order.request for order in orders]))


def load_engine(model: Model, device: str, max_batch: int) -> Engine:
    """Find a model's files from this machine and load them.

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
            f"model.source: {origin.source}: its files here ({found[:12]}) are not those where drawing began "
            f"({model.fingerprint[:12]}); give all machines the same model"
        )
    import torch

    from gtl.generate.engine import Engine
    from gtl.generate.images import load_parts

    dtype = getattr(torch, DTYPES[model.dtype])
    return Engine(family, load_parts(family, adapters, device=device, dtype=dtype), device, dtype, max_batch)
