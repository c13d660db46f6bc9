"""How long a picture takes to draw, by two models in turn on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gtl.evaluate.sampling import requests
from gtl.families import open_family
from gtl.generate.drawing import open_drawer
from gtl.generate.images import load_parts
from gtl.types import DTYPES, Sampler

if TYPE_CHECKING:
    from gtl.evaluate.result import Sampling
    from gtl.generate.drawing import Drawer
    from gtl.generate.request import Request

ROUNDS = 3
BATCH = 8
"""Pictures that are drawn at once."""


@dataclass(frozen=True)
class Drawn:
    """How the pictures of an evaluation were drawn."""

    source: str
    """Of the model."""
    adapters: Sequence[tuple[Path, float]]
    """(folder, scale), all active at once."""
    sampling: Sampling
    sampler: Sampler = "model"

    def open(self) -> tuple[Drawer, list[Request]]:
        """What draws, and its first batch."""
        family = open_family(self.source)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, DTYPES[self.sampling.dtype])
        parts = load_parts(family, self.adapters, device=device, dtype=dtype)
        return open_drawer(family, parts, device, dtype, BATCH), requests(self.sampling, BATCH, family, self.sampler)


def seconds_a_picture(sides: Sequence[Drawn]) -> list[float]:
    """Of each side the best of some rounds, which come in turn so that both meet the same noise of the machine."""
    opened = [side.open() for side in sides]
    best = [float("inf")] * len(opened)
    for _ in range(ROUNDS):
        for number, (drawer, asked) in enumerate(opened):
            begun = time.perf_counter()
            for request in asked:
                drawer.add(request)
            while len(drawer):
                drawer.decode(drawer.step())
            best[number] = min(best[number], (time.perf_counter() - begun) / len(asked))
    return best
