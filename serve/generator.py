"""The deployment that draws: one base model a replica, with the adapters of many requests in it."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtl.adapters import Registry
from gtl.config.names import parse_reference
from gtl.types import DTYPES, UserError
from serve.errors import ApiError, invalid, model_not_found, timed_out
from serve.order import Drawn, Order, Stopped
from serve.pictures import check_sides, encode
from serve.safety import Guard, Passed
from serve.schema import Limits, check_pixels
from serve.settings import Base, Safety, most_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

    from gtl.generate.edit import Edit
    from gtl.generate.engine import Engine
    from gtl.generate.loop import Course

GIB = 2**30
FETCHING = 2
"""Threads that bring adapters onto this machine."""


class Generator:
    """Draws the orders of one base. Made by `serve.app.build`."""

    def __init__(
        self,
        base: dict[str, Any],
        registry: str,
        disk_gib: float,
        safety: dict[str, Any] | None = None,
        max_pixels: int | None = None,
    ) -> None:
        """Load the model, and the safety checker if there is to be one.

        Args:
            base: See `serve.settings.Base`.
            registry: See `serve.settings.Settings`, as for `disk_gib`.
            disk_gib: Of this machine.
            safety: See `serve.settings.Safety`.
            max_pixels: Of a picture, where a config says so; see `serve.settings.most_pixels`.

        Raises:
            UserError: one of them is not what it should be.
        """
        from gtl.generate.loop import EngineLoop

        self._base, self._registry = Base.model_validate(base), Registry(registry, disk_bytes=int(disk_gib * GIB))
        self._engine = load(self._base)
        device = str(self._engine.device)
        self._guard = None if safety is None else Guard(Safety.model_validate(safety), device)
        self._print = self._engine.family.fingerprint()
        self._most = max_pixels or most_pixels(self._base, Limits(), self._engine.family.default_size)
        self._loop = EngineLoop(self._engine)
        self._folders: dict[str, Path] = {}
        """On this machine, of each NAME@VERSION that was asked for."""
        self._files = ThreadPoolExecutor(FETCHING, "fetch")

    async def draw(self, order: Order) -> AsyncIterator[Drawn]:
        """Previews and the picture of an order; whoever stops listening cancels it.

        Raises:
            UserError: the model cannot draw it, or an adapter does not fit.
            ApiError: its time is up, or it is too large, also for its file format.
            Stopped: this replica is being stopped; another can draw it.
        """
        from gtl.generate.loop import Closed
        from gtl.generate.request import Request

        loop = asyncio.get_running_loop()
        held = ExitStack()  # of files that close with it, also where what follows fails
        adapters = await loop.run_in_executor(self._files, self._fetch, order, held)
        edit, (height, width) = self._place(order)
        request = Request(
            order.prompt, height, width, order.negative_prompt, order.seed, order.steps, order.guidance,
            order.sampler,
        )  # fmt: skip
        mail = Mail(loop, order, request, self._guard)
        try:
            ticket = self._loop.submit(
                request,
                mail,
                adapters,
                alone=order.merged,
                edit=edit,
                previews=order.previews,
                timeout=order.timeout_s,
            )
        except Closed as error:
            raise outward(error, order) from None
        try:
            while True:
                found = await mail.events.get()
                if isinstance(found, Exception):
                    raise outward(found, order)
                yield found
                if found.preview is None:
                    return
        finally:
            self._loop.cancel(ticket)
            held.close()

    def _place(self, order: Order) -> tuple[Edit | None, tuple[int, int]]:
        """What an order begins at, cut to its size, and that."""
        from gtl.generate.edit import choose_size, fit

        family = self._engine.family
        own = family.default_size if order.edit is None else choose_size(order.edit.image, family)
        size = order.size or own
        check_pixels(size[1], size[0], self._most)  # an ingress does not know every model
        check_sides(*size, order.output_format)
        return order.edit and fit(order.edit, *size), size

    def _fetch(self, order: Order, held: ExitStack) -> tuple[tuple[Path, float], ...]:
        """Folders of the adapters on this machine, with their scales; there until `held` closes."""
        found = []
        for name, scale in order.adapters:
            reference = parse_reference(name)
            folder = None
            if name in self._folders:
                folder = self._registry.hold(reference.name, str(reference.version), held)
            if folder is None:
                folder = self._folders[name] = self._fetch_first(name, held)
            found.append((folder, scale))
        return tuple(found)

    def _fetch_first(self, name: str, held: ExitStack) -> Path:
        """The folder of an adapter that was made for this model, its files checked."""
        try:
            base = self._registry.show(name).base
        except UserError:  # it was removed since the registry was read
            raise model_not_found(name, field="adapters") from None
        if base.fingerprint != self._print:
            raise UserError(f"adapters: {name}: was made for another model than {self._base.name} is now")
        return self._registry.fetch(name, held)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Seconds until all that is asked of this replica is done, at its newest pace."""
        return {"busy_s": self.busy()}

    def record_routing_stats(self) -> dict[str, Any]:
        """What `serve.routing` goes by."""
        return {"busy_s": self.busy(), "pace_s": self.pace(), "adapters": self.adapters()}

    def busy(self) -> float:
        """See `record_autoscaling_stats`."""
        return self._loop.load().work * self.pace()

    def pace(self) -> float:
        """Seconds that a step of one picture took of late."""
        steps = list(self._loop.steps)
        return statistics.fmean(step.seconds / step.rows for step in steps) if steps else 1.0

    def adapters(self) -> list[str]:
        """NAME@VERSION of those in slots."""
        residents = self._engine.residents
        keys = () if residents is None else residents.resident()
        there = {folder for key in keys for folder, _ in key}
        return sorted(name for name, folder in self._folders.items() if folder in there)

    def status(self) -> dict[str, int]:
        """That it is there, and how much it has to do."""
        load = self._loop.load()
        return {"waiting": load.waiting, "running": load.running}

    def check_health(self) -> None:
        """Raise where the thread that draws has died: Ray Serve then starts another replica.

        Raises:
            RuntimeError: it has.
        """
        if not self._loop.is_alive():
            raise RuntimeError("the engine has stopped")

    def __del__(self) -> None:
        """Ray Serve has let finish what was running; end the threads."""
        if (loop := getattr(self, "_loop", None)) is not None:
            loop.close()


def outward(error: Exception, order: Order) -> Exception:
    """An error for a process that has no torch, which the loop's own and torch's would bring."""
    import torch

    from gtl.generate.loop import Closed, Late

    if isinstance(error, Late):
        return timed_out(order.timeout_s)
    if isinstance(error, torch.OutOfMemoryError):
        return invalid("size", "so large a picture does not fit into this server's memory", "invalid_value")
    if type(error).__module__.partition(".")[0] == "torch":
        return RuntimeError(f"{type(error).__name__}: {error}")
    return Stopped() if isinstance(error, Closed) else error


class Mail:
    """Brings what the engine's threads tell to the event loop that waits for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, order: Order, request: Any, guard: Guard | None = None) -> None:
        """For one order; what `guard` does not let pass stays here."""
        self.events: asyncio.Queue[Drawn | Exception] = asyncio.Queue()
        self._loop, self._order, self._request, self._guard = loop, order, request, guard

    def _look(self, image: Image) -> Passed:
        return Passed(image, False) if self._guard is None else self._guard.look(image)

    def preview(self, number: int, image: Image) -> None:
        """An estimate. One that is kept back, or no file, is left out: the picture may be another matter."""
        try:
            image, is_flagged = self._look(image)
            data = encode(image, self._order.output_format, self._order.quality)
        except (ApiError, RuntimeError, OSError, ValueError):
            return
        self._send(Drawn(data, size_of(image), number, is_flagged=is_flagged))

    def finish(self, image: Image, course: Course) -> None:
        """The picture, or why there is none: it is kept back, or cannot be made a file."""
        try:
            passed = self._look(image)
            told = self._told() | ({"flagged": True} if passed.is_flagged else {})
            data = encode(passed.image, self._order.output_format, self._order.quality, told)
        except (ApiError, RuntimeError, OSError, ValueError) as error:  # what is raised here would end the thread
            self._send(error)
            return
        went = (course.waited_s, course.step_s, course.batch, course.was_there)
        self._send(Drawn(data, size_of(image), None, went, passed.is_flagged))

    def _told(self) -> dict[str, Any]:
        """What a PNG's metadata says."""
        from gtl import __version__

        order, request = self._order, self._request
        told = {
            "negative_prompt": order.negative_prompt, "seed": order.seed, "steps": order.steps,
            "guidance": order.guidance, "height": request.height, "width": request.width,
            "gtl": __version__, **order.told,
        }  # fmt: skip
        if order.edit is not None:
            told |= told_of(order.edit)
        if order.keep_prompt:
            return {**told, "prompt": order.prompt}
        return {name: value for name, value in told.items() if name not in ("negative_prompt", "invert")}

    def fail(self, error: Exception) -> None:
        """No picture."""
        self._send(error)

    def _send(self, event: Drawn | Exception) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


def told_of(edit: Edit) -> dict[str, Any]:
    """How a picture came of another."""
    by_image, shows, palette = edit.image_guidance, edit.shows, edit.palette
    told: dict[str, Any] = {"strength": edit.strength} if by_image is None else {"image_guidance": by_image}
    told |= {} if shows is None else {"invert": shows}
    return told if palette is None else {**told, "palette": palette._asdict()}


def size_of(image: Image) -> tuple[int, int]:
    """(height, width)."""
    return image.height, image.width


def load(base: Base) -> Engine:
    """The model on this process's device, its layers with slots.

    Raises:
        UserError: the model is not what it should be.
    """
    import torch

    from gtl.adapters.residents import Residents
    from gtl.families import denoising, open_family
    from gtl.generate.engine import Engine
    from gtl.generate.images import load_parts

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = ("bf16" if device == "cuda" else "fp32") if base.dtype == "auto" else base.dtype
    dtype = getattr(torch, DTYPES[name])
    family = denoising(open_family(base.source, revision=base.revision, variant=base.variant))
    parts = load_parts(family, (), device=device, dtype=dtype)
    targets = {family.main: family.lora_targets(parts[family.main], base.targets)}
    targets |= {part: family.encoder_targets(parts[part], "all-linear") for part in family.encoders}
    residents = Residents(
        {part: parts[part] for part in (*targets, family.codec) if part}, targets, base.slots + 1, base.max_rank,
        host_bytes=int(base.host_gib * GIB), steady=base.compile,
    )  # fmt: skip
    height, width = family.default_size
    pixels = base.max_pixels or base.max_batch * height * width
    return Engine(
        family, parts, device, dtype, base.max_batch, max_pixels=pixels, residents=residents, compile=base.compile
    )
