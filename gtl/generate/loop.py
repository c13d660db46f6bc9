"""An engine that runs in a thread of its own: requests come from others, pictures are handed back as they are done.

Three things go on at once. A few threads read adapters from their files and encode the images that edits begin at, one
thread takes the engine's steps, and one decodes and so holds up neither. Nothing here knows who asks.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from gtl.adapters.residents import BASE, Adapters, Loaded
from gtl.generate.edit import Edit, first_step, looks_of
from gtl.generate.engine import Engine, Output
from gtl.generate.pixels import to_image
from gtl.generate.request import Request, check
from gtl.types import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

READERS = 2
"""Threads that read adapters and encode images."""


class Late(Exception):
    """A request's time is up."""


class Closed(Exception):
    """The loop takes no more requests, or ended before this one was through."""


class Step(NamedTuple):
    """What the loop tells of a step."""

    rows: int
    """Requests in it."""
    seconds: float


class Course(NamedTuple):
    """How a picture came about."""

    waited_s: float
    """Until its first step began."""
    step_s: float
    """Of a step on average."""
    batch: float
    """Requests in a step on average, itself among them."""
    was_there: bool
    """Whether its adapters were on the device already."""


class Listener(Protocol):
    """Is told what becomes of a request, from the loop's threads: quick, and never raising."""

    def preview(self, number: int, image: Image) -> None:
        """An estimate of the picture, the numbers from 0."""
        ...

    def finish(self, image: Image, course: Course) -> None:
        """The picture, and how it came about. Nothing follows."""
        ...

    def fail(self, error: Exception) -> None:
        """There is none, and why: `Late`, `Closed`, a UserError, or what went wrong. Nothing follows."""
        ...


@dataclass(eq=False)
class Ticket:
    """A request in the loop."""

    request: Request
    adapters: Adapters
    previews: Sequence[int]
    deadline: float
    """On `time.monotonic`'s clock."""
    listener: Listener
    edit: Edit | None = None
    """What it begins at, if that is not noise."""
    steps: int = 0
    """That it takes, those up to the noise of an image among them."""
    alone: bool = False
    loaded: Loaded | None = None
    handle: int | None = None
    """The engine's, once it is drawn."""
    is_over: bool = False
    since: float = field(default_factory=time.monotonic)
    waited: float = 0.0
    was_there: bool = True
    went: list[Step] = field(default_factory=list)
    """Steps that it was in."""

    def course(self) -> Course:
        """So far."""
        number = max(1, len(self.went))
        seconds, rows = sum(step.seconds for step in self.went), sum(step.rows for step in self.went)
        return Course(self.waited, seconds / number, rows / number, self.was_there)


class Load(NamedTuple):
    """How busy the loop is."""

    waiting: int
    """Requests that are not drawn yet."""
    running: int
    work: float
    """Steps still to be done of all of them, each times its share of a picture of the model's default size."""


class EngineLoop:
    """Draws whatever is submitted until it is closed."""

    def __init__(self, engine: Engine, *, max_active: int | None = None) -> None:
        """Start the threads.

        Args:
            engine: Is the loop's alone from now on.
            max_active: Requests that are in the engine at once, with latents and prompts; None: four batches.
        """
        self.engine = engine
        self.steps: deque[Step] = deque(maxlen=256)
        """The newest ones."""
        self._max_active = max_active or 4 * engine.max_batch
        self._wake = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._reading: set[Ticket] = set()
        self._running: dict[int, Ticket] = {}
        self._cancelled: list[Ticket] = []
        self._is_closed = False
        self._pictures: queue.SimpleQueue[list[tuple[Ticket, Output]] | None] = queue.SimpleQueue()
        self._readers = ThreadPoolExecutor(READERS, "read")
        self._threads = [
            threading.Thread(target=self._run, args=(work,), daemon=True) for work in (self._draw, self._decode)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, request: Request, listener: Listener, adapters: Adapters = (), *, alone: bool = False,
        edit: Edit | None = None, previews: int = 0, timeout: float = float("inf"),
    ) -> Ticket:  # fmt: skip
        """Take a request in.

        Args:
            request: What to draw.
            listener: Is told.
            adapters: All active at once.
            alone: Merge them into the weights, see `Residents.read`.
            edit: What to begin at, if it is not noise.
            previews: Estimates that are wanted on the way, evenly spread over the steps.
            timeout: Seconds after which it is given up.

        Raises:
            UserError: the family cannot draw it. What is wrong with adapters the listener is told.
            Closed: the loop takes no more.
        """
        check(request, self.engine.family, edit)
        if adapters and self.engine.residents is None:
            raise ValueError("an engine without residents draws without adapters")
        steps = request.steps - first_step(edit, request.steps, self.engine.family.path)
        after = [round(steps * (number + 1) / (previews + 1)) for number in range(previews)]
        shown = tuple(step for step in dict.fromkeys(after) if 0 < step < steps)
        looks = looks_of(edit, steps)
        ticket = Ticket(request, adapters, shown, time.monotonic() + timeout, listener, edit, looks, alone)
        with self._wake:
            if self._is_closed:
                raise Closed("it is being stopped")
            if not adapters and edit is None:
                self._waiting.append(ticket)
                self._wake.notify()
                return ticket
            self._reading.add(ticket)
        self._readers.submit(self._read, ticket).add_done_callback(lambda future: self._arrive(ticket, future))
        return ticket

    def _read(self, ticket: Ticket) -> None:
        """Bring what a request needs into memory."""
        if ticket.adapters and self.engine.residents is not None:
            ticket.loaded = self.engine.residents.read(ticket.adapters, alone=ticket.alone)
        if ticket.edit is not None:
            own = {} if ticket.loaded is None else ticket.loaded.own(self.engine.family.codec)
            ticket.edit = self.engine.encode(ticket.edit, ticket.request, own)

    def _arrive(self, ticket: Ticket, future: Future[None]) -> None:
        """What a request needs is in memory, or refused."""
        error = future.exception()
        with self._wake:
            self._reading.discard(ticket)
            self._wake.notify()
            if ticket.is_over:
                return
            if error is None and not self._is_closed:
                self._waiting.append(ticket)
                return
        if isinstance(error, Exception) or error is None:
            self._fail(ticket, error or Closed("it is being stopped"))

    def cancel(self, ticket: Ticket) -> None:
        """Give a request up, before the next step. Its listener is told nothing any more."""
        with self._wake:
            ticket.is_over = True
            self._cancelled.append(ticket)
            self._wake.notify()

    def load(self) -> Load:
        """How busy it is; from any thread."""
        with self._wake:
            waiting, running = [*self._reading, *self._waiting], [*self._running.values()]
        usual = self.engine.family.default_size[0] * self.engine.family.default_size[1]
        work = 0.0
        for ticket in (*waiting, *running):
            request = ticket.request
            done = 0 if ticket.handle is None else self.engine.steps_done(ticket.handle)
            work += max(0, ticket.steps - done) * request.height * request.width / usual
        return Load(len(waiting), len(running), work)

    def is_alive(self) -> bool:
        """Whether all of its threads run."""
        return all(thread.is_alive() for thread in self._threads)

    def close(self, timeout: float = 0.0) -> None:
        """Take no more; let what is there finish for so many seconds, then end."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        end = time.monotonic() + timeout
        while time.monotonic() < end and any(self.load()[:2]):
            time.sleep(0.02)
        with self._wake:
            for ticket in (*self._waiting, *self._running.values()):
                ticket.deadline = 0.0
            self._wake.notify()
        for thread in self._threads:
            thread.join()
        self._readers.shutdown(cancel_futures=True)

    def _run(self, work: Callable[[], None]) -> None:
        """Do a thread's work; a fault of it ends the loop, and leaves nobody waiting for ever."""
        try:
            work()
        except Exception as error:
            with self._wake:
                self._is_closed = True
                left = [*self._waiting, *self._running.values()]
                self._waiting.clear()
                self._running.clear()
                self._wake.notify()
            for ticket in left:
                self._fail(ticket, error)
            self._pictures.put(None)
            raise

    def _draw(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: self._waiting or self._running or self._cancelled or self._is_closed and not self._reading
                )
                if self._is_closed and not (self._waiting or self._running or self._reading):
                    self._pictures.put(None)
                    return
            self._sweep()
            self._admit()
            if self._running:
                self._step()

    def _sweep(self) -> None:
        """Drop what was cancelled and what is late."""
        with self._wake:
            cancelled, self._cancelled = self._cancelled, []
            now = time.monotonic()
            late = [t for t in (*self._waiting, *self._running.values()) if t.deadline <= now and not t.is_over]
            gone = {id(ticket) for ticket in (*cancelled, *late)}
            self._waiting = deque(ticket for ticket in self._waiting if id(ticket) not in gone)
        for ticket in (*cancelled, *late):
            if ticket.handle is not None and self._running.pop(ticket.handle, None) is not None:
                self.engine.cancel(ticket.handle)
        for ticket in late:
            closed = self._is_closed and ticket.deadline == 0.0
            self._fail(ticket, Closed("it was stopped") if closed else Late("its time is up"))

    def _admit(self) -> None:
        """Let those who wait in, in their order; only one that needs a pass of its own lets others past.

        Not those that do too: else it would wait for as long as they come.
        """
        with self._wake:
            waiting = list(self._waiting)
        has_own = False
        for ticket in waiting:
            if len(self._running) >= self._max_active:
                return
            seat = BASE
            if ticket.loaded is not None and self.engine.residents is not None:
                if has_own and ticket.loaded.reason is not None:
                    continue
                found = self.engine.residents.seat(ticket.adapters, ticket.loaded)
                if found is None:
                    if ticket.loaded.reason is not None:
                        has_own = True
                        continue
                    return
                seat = found
                ticket.was_there = found.was_there
            try:
                ticket.handle = self.engine.add(ticket.request, seat, ticket.previews, ticket.edit)
            except Exception as error:
                self._fail(ticket, error)
            with self._wake:
                self._waiting.remove(ticket)
                if ticket.handle is not None:
                    self._running[ticket.handle] = ticket
            ticket.waited = time.monotonic() - ticket.since

    def _step(self) -> None:
        began = time.perf_counter()
        try:
            outputs = self.engine.step()
        except torch.OutOfMemoryError as error:
            rows = len(self.engine.batch)
            if rows > 1:
                self.engine.max_batch = rows // 2
            else:  # it is too large by itself: no smaller batch helps, and the others are not to blame
                self._fail_those(self.engine.batch, error)
            torch.cuda.empty_cache()
            return
        except Exception as error:
            self._fail_those(tuple(self._running), error)
            return
        step = Step(len(self.engine.batch), time.perf_counter() - began)
        self.steps.append(step)
        for handle in self.engine.batch:
            self._running[handle].went.append(step)
        if outputs:
            done = [(self._running[output.handle], output) for output in outputs]
            for _, output in done:
                if output.preview is None:
                    del self._running[output.handle]
            self._pictures.put(done)

    def _decode(self) -> None:
        while (done := self._pictures.get()) is not None:
            done = [(ticket, output) for ticket, output in done if not ticket.is_over]
            try:
                pictures = self.engine.decode([output for _, output in done])
            except Exception as error:
                for ticket, _ in done:
                    self._fail(ticket, error)
                continue
            for (ticket, output), pixels in zip(done, pictures, strict=True):
                if output.preview is not None:
                    ticket.listener.preview(output.preview, to_image(pixels.nan_to_num()))
                elif pixels.isnan().any():
                    self._fail(ticket, UserError("adapters: the model draws NaN, no picture; a scale is far too large"))
                elif not ticket.is_over:
                    ticket.is_over = True
                    ticket.listener.finish(to_image(pixels), ticket.course())

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        if not ticket.is_over:
            ticket.is_over = True
            ticket.listener.fail(error)

    def _fail_those(self, handles: Sequence[int], error: Exception) -> None:
        """What is drawn together fails together."""
        for handle in handles:
            self.engine.cancel(handle)
            self._fail(self._running.pop(handle), error)
