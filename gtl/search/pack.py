"""Packs on the cluster: actors that own a device each, in which several trials train in one forward pass."""

from __future__ import annotations

import math
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from gtl.config import Study
from gtl.config.load import parse_recipe
from gtl.config.trials import unpacked
from gtl.report.chart import short
from gtl.search.room import Room, corners
from gtl.session import Cluster, get
from gtl.train.board import Post
from gtl.train.group import process_group
from gtl.train.halve import too_large
from gtl.train.job import Job
from gtl.train.launch import begin, open_model
from gtl.types import Progress, UserError, quiet

if TYPE_CHECKING:
    import torch

    from gtl.search.trial import Place
    from gtl.train.pack import Member, Pack

Answer = TypeVar("Answer")

COUNTS = (1, 2, 4, 8)
"""Trials in a pass that `pack: auto` tries."""
WORTH = 1.2
"""Times as many trials an hour, from which on a pack is worth it."""
POLL_S = 0.2
"""Between two looks for a free place."""


class PackActor:
    """A process with a device, which trains whatever runs are in it. One thread of it computes; calls wait."""

    def __init__(self, places: int, rank: int) -> None:
        """Room for so many runs of at most a rank. The model is that of the first."""
        self._places, self._rank = places, rank
        self._calls: queue.Queue[Callable[[], None]] = queue.Queue()
        self._lock, self._taken = threading.Lock(), 0
        self._pack: Pack | None = None
        self._ends: dict[int, Future[None]] = {}
        """What waits for the end of every member, by its id."""
        threading.Thread(target=self._work, daemon=True).start()

    def seat(self, most: int) -> bool:
        """Keep a place for a run, if fewer than so many are kept; `train` gives it back."""
        with self._lock:
            is_free = self._taken < most
            self._taken += is_free
        return is_free

    def train(self, job: dict[str, Any], board: Any) -> None:
        """Train a run to its end, or until the board asks it to stop.

        Raises:
            Exception: what it met. A mistake of the user's is on the board instead.
        """
        import torch

        post = Post(board)
        try:
            self._ask(lambda: self._join(Job(**job), post)).result()
            post.finish()
        except UserError as error:
            ray.get(board.post_mistake.remote(str(error)))
        except torch.OutOfMemoryError:
            ray.get(board.post_mistake.remote(too_large(parse_recipe(job["recipe"]))))
        finally:
            with self._lock:
                self._taken -= 1

    def seconds(self, job: dict[str, Any], counts: Sequence[int]) -> dict[int, float]:
        """See `Pack.seconds`; nothing where not even the model fits into memory."""
        import torch

        try:
            return self._ask(lambda: self._open(Job(**job)).seconds(Job(**job), counts))
        except torch.OutOfMemoryError:
            return {}

    def _ask(self, act: Callable[[], Answer]) -> Answer:
        """What the thread that computes makes of it between two steps."""
        answer: Future[Answer] = Future()

        def call() -> None:
            try:
                answer.set_result(act())
            except Exception as error:
                answer.set_exception(error)

        self._calls.put(call)
        return answer.result()

    def _join(self, job: Job, post: Post) -> Future[None]:
        """Give a run its place; what is returned is done when it leaves."""
        member = self._open(job).join(job, post)
        over = self._ends[id(member)] = Future[None]()
        return over

    def _open(self, job: Job) -> Pack:
        from gtl.train.pack import Pack
        from gtl.train.worker import check_base

        if self._pack is None:
            pack = Pack(job, device_here(), self._places, self._rank)
            check_base(pack.family, job)
            self._pack = pack
        return self._pack

    def _work(self) -> None:
        with tempfile.TemporaryDirectory() as folder, process_group(folder, device_here()):
            while True:
                has_members = self._pack is not None and bool(self._pack.members)
                for call in waiting(self._calls, block=not has_members):
                    call()
                if self._pack is not None and self._pack.members:
                    for member in self._step(self._pack):
                        self._end(member)

    def _step(self, pack: Pack) -> list[Member]:
        """The members that left. What nobody is to blame for ends all of them; the next ones get a new model."""
        try:
            return pack.step()
        except Exception as error:
            self._pack = None
            return pack.abandon(error)

    def _end(self, member: Member) -> None:
        over = self._ends.pop(id(member))
        if member.error is None:
            over.set_result(None)
        else:
            over.set_exception(member.error)


def waiting(calls: queue.Queue[Callable[[], None]], *, block: bool) -> Iterator[Callable[[], None]]:
    """What is in a queue; with `block` at least one."""
    try:
        yield calls.get(block)
        while True:
            yield calls.get_nowait()
    except queue.Empty:
        return


def device_here() -> torch.device:
    """The actor's device."""
    import torch

    return torch.device("cuda", 0) if ray.get_gpu_ids() else torch.device("cpu")


@dataclass(frozen=True)
class Packs:
    """The packs of a study, for its trials."""

    actors: Sequence[Any]
    places: int
    """Of each."""

    @property
    def concurrency(self) -> int:
        """Trials at once."""
        return len(self.actors) * self.places

    def train(self, job: Job, board: Any) -> None:
        """Train a run in the first pack that has a place; in another one, or the same again, if its process dies.

        Raises:
            ray.exceptions.RayError: what it met.
        """
        left = job.recipe["train"]["max_failures"]
        while True:
            actor = self._find()
            try:
                ray.get(actor.train.remote(asdict(job), board))
                return
            except ray.exceptions.RayActorError:
                if left == 0:
                    raise
                left -= 1

    def _find(self) -> Any:
        while True:
            for actor in self.actors:
                try:
                    if ray.get(actor.seat.remote(self.places)):
                        return actor
                except ray.exceptions.RayActorError:  # it starts again
                    continue
            time.sleep(POLL_S)


@contextmanager
def packs_for(
    study: Study, place: Place, room: Room, cluster: Cluster, trials: int, progress: Progress
) -> Iterator[Packs | None]:
    """Packs for so many trials; None where they train alone."""
    if study.pack == "off" or unpacked(study) is not None or trials < 2:
        yield None
        return
    most = max(COUNTS) if study.pack == "auto" else study.pack
    rank = max(recipe.tuner.rank for recipe in map(study.recipe_of, corners(study)))  # type: ignore[union-attr]
    resources = room.resources
    take = {"num_cpus": resources.cpus_per_worker, "num_gpus": resources.gpus_per_worker}
    kind: Any = ray.remote(PackActor)
    kind = kind.options(**take, max_restarts=-1, max_concurrency=2 * most + 2)  # a call for each run, and some to spare
    actors = [kind.remote(most, rank)]
    try:
        if study.pack == "auto":
            most = best_count(measure(study, place, cluster, actors[0], min(most, trials), progress), progress)
        if most == 1:
            ray.kill(actors.pop())
            yield None
            return
        number = min(room.concurrency, math.ceil(trials / most))
        actors += [kind.remote(most, rank) for _ in range(number - 1)]
        yield Packs(actors, most)
    finally:
        for actor in actors:
            ray.kill(actor)


def measure(
    study: Study, place: Place, cluster: Cluster, actor: Any, most: int, progress: Progress
) -> dict[int, float]:
    """Seconds of a step of so many trials at once, on the device of a pack."""
    progress("pack", 0, 0, "measuring steps of several trials at once")
    recipe = place.recipe(study, corners(study)[-1])
    with tempfile.TemporaryDirectory() as folder:
        storage = recipe.storage.model_copy(update={"runs": folder})
        recipe = recipe.model_copy(update={"storage": storage})
        job = begin(recipe, "measured", place.version, open_model(recipe, quiet), cluster, quiet).job
        taken: dict[int, float] = get(actor.seconds.remote(asdict(job), [n for n in COUNTS if n <= most]))
    return taken


def best_count(seconds: dict[int, float], progress: Progress) -> int:
    """The number of trials in a pass that gives the most of them an hour; 1 where packing is not worth it.

    Args:
        seconds: See `Pack.seconds`.
        progress: Is told of the gains.
    """
    if 1 not in seconds:  # alone it goes on with less at once
        progress("pack", 0, 0, "off (a step of the largest trial has no room on a device at once)")
        return 1
    gains = {count: count * seconds[1] / taken for count, taken in seconds.items()}
    best = max(gains, key=gains.__getitem__)
    best = best if gains[best] >= WORTH else 1
    shown = ", ".join(f"{count}: {short(gain)}" for count, gain in gains.items() if count > 1)
    progress("pack", 0, 0, f"{f'{best} trials in a pass' if best > 1 else 'off'} (times the steps an hour: {shown})")
    return best
