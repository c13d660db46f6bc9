"""What travels between the ingress and a generator, and for how long: plain values, without torch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from gtl.generate.edit import Edit
from gtl.types import Sampler


@dataclass(frozen=True)
class Order:
    """One picture to draw. All of it is settled at admission, so that another replica draws the same."""

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance: float
    size: tuple[int, int] | None
    """(height, width) in pixels; None: what the model was made for."""
    adapters: tuple[tuple[str, float], ...] = ()
    """NAME@VERSION and scale."""
    sampler: Sampler = "model"
    merged: bool = False
    """Whether they are merged into the weights, though they could share a batch."""
    edit: Edit | None = None
    """What it begins at, of any size; None: noise."""
    previews: int = 0
    timeout_s: float = 300.0
    output_format: Literal["png", "webp", "jpeg"] = "png"
    quality: int = 100
    told: Mapping[str, Any] = field(default_factory=dict)
    """What a PNG's metadata says beside."""
    keep_prompt: bool = True


class Drawn(NamedTuple):
    """A preview, or the picture."""

    data: bytes
    """The encoded file."""
    size: tuple[int, int]
    """(height, width)."""
    preview: int | None
    """Its number; None: it is the picture."""
    course: tuple[float, float, float, bool] | None = None
    """How the picture came about, as `gtl.generate.loop.Course`."""
    is_flagged: bool = False
    """By the safety checker, and so blurred."""


class Stopped(Exception):
    """A generator is being stopped, and another one can draw."""


async def until(end: float, stream: AsyncIterator[Drawn]) -> AsyncIterator[Drawn]:
    """What a stream has to tell by a moment of the clock; then `asyncio.TimeoutError`.

    A generator keeps the time by itself between two steps. A step that takes too long, a bucket that does not answer
    and a generator that is still to start do not.
    """
    while True:
        try:
            yield await asyncio.wait_for(anext(stream), end - time.monotonic())
        except StopAsyncIteration:
            return
