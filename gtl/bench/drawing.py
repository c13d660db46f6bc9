"""The arms of `gtl bench serve`: the engine with adapters in slots, with one merged, and plain diffusers."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from gtl.adapters.residents import Loaded, Residents, shadow
from gtl.bench.models import CAPTION, encoded, random_part, write_adapter, write_model
from gtl.bench.swapping import Swapping
from gtl.bench.train import dtype_on, synchronize
from gtl.generate.engine import Engine, Output
from gtl.generate.loop import Course, EngineLoop, Ticket
from gtl.generate.request import Request, check
from gtl.types import DTYPES

if TYPE_CHECKING:
    from PIL.Image import Image

    from gtl.bench.configs import Config
    from gtl.bench.serve import Serving

SLOTTED = "all-linear+conv"
"""Layers with slots, as in `gtl serve`; where no adapter of a batch has an update the base's layer runs alone."""
GUIDANCE = 5.0
LONG = 900
"""Steps of requests that are only company."""
PAUSE = 2e-4
"""Seconds between two looks at whether a step is done."""


class Seconds(NamedTuple):
    """What an arm took in a round."""

    clock: float
    processor: float
    """Of all threads of this process. On a CPU shared with others it says more than the clock, on a GPU nothing."""


class Arms:
    """Ways to draw the same requests on one model, whose base weights they share."""

    def __init__(
        self, serving: Serving, folder: Path, device: torch.device, overrides: Mapping[str, Config] | None = None
    ) -> None:
        """Make the model and its adapters.

        Args:
            serving: What is drawn.
            folder: Empty.
            device: Where all are drawn.
            overrides: Of the model's configs, see `gtl.bench.models.write_model`.

        Raises:
            UserError: the model cannot draw it.
        """
        name = dtype_on(device)
        dtype = getattr(torch, DTYPES[name])
        self.family = family = write_model(folder / "model", serving.model, name, overrides)
        self.size = family.default_size if serving.size is None else (serving.size, serving.size)
        asked = Request(CAPTION, *self.size, steps=serving.steps, guidance=GUIDANCE)
        check(asked, family)
        self.device = device
        main = family.load(family.main, dtype, str(device))
        targets = family.lora_targets(main, serving.targets)
        folders = [
            write_adapter(main, family.main, targets, serving.rank, seed, folder / f"adapter{seed}")
            for seed in range(serving.adapters)
        ]
        self.work = [(replace(asked, seed=seed), folders[seed % len(folders)]) for seed in range(serving.requests)]
        """Requests and their adapters."""
        parts = {family.main: main}
        if family.codec:
            parts[family.codec] = random_part(family, family.codec, torch.float32, device)
        prompts = encoded(family, dtype, torch.Generator().manual_seed(0))
        self.swapping = Swapping(family, {**parts, family.main: shadow(main)}, prompts)
        self.residents = Residents(
            {family.main: main}, {family.main: family.lora_targets(main, SLOTTED)}, serving.adapters + 1, serving.rank
        )
        self.engine = Engine(
            family, parts, device, dtype, serving.batch, encoded=prompts, residents=self.residents
        )  # fmt: skip
        slotted = {folder: self.residents.read(((folder, 1.0),)) for folder in folders}
        merged = self.residents.read(((folders[0], 1.0),), alone=True)
        self._loaded: dict[str, list[Loaded]] = {
            "mixed": [slotted[folder] for _, folder in self.work],
            "merged": [merged for _ in self.work],
            "single": [slotted[folders[0]] for _ in self.work],
        }
        self.outputs: dict[str, list[Output]] = {}
        """What came of an arm's newest round, request by request."""

    def draw(self, arm: str) -> Seconds:
        """All requests in one of the engine's arms: mixed, merged or single. Its adapters are on the device before."""
        seats = []
        for loaded in self._loaded[arm]:
            seat = self.residents.seat(loaded.key, loaded)
            if seat is None:
                raise RuntimeError("there are more adapters than slots")
            seats.append(seat)
        outputs: list[Output] = []

        def steps() -> None:
            for (request, _), seat in zip(self.work, seats, strict=True):
                self.engine.add(request, seat)
            while len(self.engine):
                outputs.extend(self.engine.step())

        seconds = self._timed(steps)
        self.outputs[arm] = sorted(outputs, key=lambda output: output.handle)
        return seconds

    def swap(self, count: int) -> Seconds:
        """The first requests one by one, each with its adapter put on and taken off, in plain diffusers."""
        return self._timed(lambda: self.swapping.draw(self.work[:count]))

    def decode(self) -> Seconds:
        """The pictures of the newest mixed round."""
        return self._timed(lambda: self.engine.decode(self.outputs["mixed"]))

    def _timed(self, work: Callable[[], object]) -> Seconds:
        synchronize(self.device)
        clock, processor = time.perf_counter(), time.process_time()
        work()
        synchronize(self.device)
        return Seconds(time.perf_counter() - clock, time.process_time() - processor)

    def join(self, times: int, rng: random.Random) -> list[float]:
        """How long a request takes until its first step is done while others are drawn, in steps of that batch.

        Those others leave one place in the batch. Adapters are in host memory.

        Args:
            times: How often one more request comes.
            rng: Draws at which moments of a step.
        """
        count = min(len(self.work), self.engine.max_batch)
        *others, (request, adapter) = [(replace(one, steps=LONG), ((f, 1.0),)) for one, f in self.work[:count]]
        loop, waits = EngineLoop(self.engine), list[float]()
        try:
            company = [loop.submit(one, Silent(), adapters) for one, adapters in others]
            for ticket in company:
                self._await(ticket)
            for _ in range(times):
                time.sleep(rng.random() * loop.steps[-1].seconds)
                begun = time.perf_counter()
                ticket = loop.submit(request, Silent(), adapter)
                self._await(ticket)
                waits.append(time.perf_counter() - begun)
                loop.cancel(ticket)
            step = statistics.median(step.seconds for step in loop.steps if step.rows >= len(company))
            for ticket in company:
                loop.cancel(ticket)
        finally:
            loop.close()
        return [wait / step for wait in waits]

    def _await(self, ticket: Ticket) -> None:
        """Until a step of a request is done."""
        while ticket.handle is None or not self.engine.steps_done(ticket.handle):
            if ticket.is_over:
                raise RuntimeError("a request ended before its first step")
            time.sleep(PAUSE)


class Silent:
    """A listener whom nobody asks: these requests are cancelled after a step."""

    def preview(self, number: int, image: Image) -> None:
        """None is wanted."""

    def finish(self, image: Image, course: Course) -> None:
        """It does not come so far."""

    def fail(self, error: Exception) -> None:
        """Who waits for the step sees it."""
