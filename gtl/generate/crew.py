"""Work on a cluster: actors that each do small batches of it, also those that another was lost with.

Ray could start a lost actor again and repeat its calls (`max_restarts`, `max_task_retries`), but they stay that
actor's: where its machine is gone and there is no room for another they wait for ever, however idle the others are.
`ray.util.ActorPool` gives an actor one call at a time and forgets the call that it died over. So calls are handed out
here, and a lost actor's go to whoever is free.
"""

from __future__ import annotations

import platform
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from gtl import __version__
from gtl.session import get
from gtl.types import Progress, UserError

AHEAD = 2
"""Batches that an actor has at most: while one is done the next is there, and what the last left to do is done."""
MOST_LOSSES = 3
"""So often a batch may be lost with the actor that has it: what kills three is the batch."""
LOOK_S = 1.0
"""Between two looks at the progress while nothing is done."""


class Member(Protocol):
    """Lives as an actor on one device, the first argument that it is made with."""

    def begin(self, code: str) -> None:
        """Answer as soon as there is a place for the actor; see `check_code`."""
        ...

    def work(self, items: Sequence[Any]) -> Sequence[Any]:
        """What becomes of a batch's items, in their order. Two threads may call at once.

        Raises:
            UserError: a mistake of the user's, which ends all of the work.
        """
        ...


@dataclass(eq=False)
class Batch:
    """Items that one actor works on together."""

    positions: list[int]
    """Of the items in all of the work."""
    items: Sequence[Any]
    about: str
    """What an item is like, for people."""
    losses: int = 0
    """Actors that were lost with it."""


class Call(NamedTuple):
    """Something an actor was asked for; None: whether it has begun to work."""

    worker: Any
    batch: Batch | None


def check_code(code: str) -> None:
    """Refuse to work for another version of gtl.

    Raises:
        UserError: this machine has another one.
    """
    if code != __version__:
        raise UserError(f"gtl {__version__} on {platform.node()}, {code} where work began; install one version")


@contextmanager
def naming_machine() -> Iterator[None]:
    """Within it a mistake of the user's says which machine of the cluster met it.

    Raises:
        UserError: so.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} (a worker on {platform.node()})") from None


def choose_gpus() -> int:
    """GPUs of an actor: 1 where the connected cluster has any, else 0."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0) > 0)


def choose_places(gpus: int, most: int, memory: int = 0) -> int:
    """How many actors to have: as many as find room at once, from 1 to `most`.

    Args:
        gpus: Of each, 1 or 0.
        most: That have something to do.
        memory: Bytes that each takes, which counts on CPUs: there may be many more of these than fit.
    """
    import ray

    free = ray.available_resources()
    places = min(int(free.get("GPU" if gpus else "CPU", 0)), most)
    if memory and not gpus:
        places = min(places, int(free.get("memory", 0) // memory))
    return max(1, places)


def work_through(crew: Crew, phase: str, progress: Progress) -> Generator[tuple[int, Any], None, None]:
    """(position, result) of all items as they are done, in any order, each once; then the crew is closed.

    Raises:
        UserError: as `Crew.wait`.
    """
    done = 0
    with closing(crew):
        progress(phase, done, crew.total, crew.state)
        while done < crew.total:
            for position, result in crew.wait():
                done += 1
                progress(phase, done, crew.total, crew.state)
                yield position, result
            if done < crew.total:
                progress(phase, done, crew.total, crew.state)


class Crew:
    """The actors, and who of them has which batch."""

    def __init__(
        self, member: type[Member], arguments: tuple[Any, ...], batches: Sequence[Batch], number: int, gpus: int
    ) -> None:
        """Ask the cluster for so many actors, each with 1 or 0 GPUs; it may take its time.

        Args:
            member: What they are.
            arguments: What they are made with, behind the device.
            batches: The work.
            number: Of actors.
            gpus: Of each.
        """
        import ray

        self._make: Any = ray.remote(num_cpus=1, num_gpus=gpus)(member).options(max_concurrency=AHEAD)
        self._arguments = "cuda" if gpus else "cpu", *arguments
        self.total = sum(len(batch.items) for batch in batches)
        """Items."""
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

    def wait(self) -> list[tuple[int, Any]]:
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
            results = get(ready[0])
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
        return list(zip(batch.positions, results, strict=True))

    def close(self) -> None:
        """End the actors at once."""
        import ray

        for worker in {*self._at_work, *(call.worker for call in self._calls.values())}:
            ray.kill(worker)
        failed, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0) if self._calls else ([], [])
        for call in failed:  # or Ray prints the error of a batch that was begun when another one's ended the work
            with suppress(Exception):
                ray.get(call)

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
                    self._calls[worker.work.remote(batch.items)] = Call(worker, batch)
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
                raise UserError(f"{batch.losses} workers died over {batch.about}: {reason(error)}")
        if self._died >= MOST_LOSSES * self._number:
            raise UserError(f"{self._died} workers died before any was through with a batch: {reason(error)}")
        self._start()


def reason(error: Exception) -> str:
    """Ray's reason on one line, without what it is usually."""
    return " ".join(str(error).splitlines()[-1].partition(" Some common causes")[0].split())[:300]
