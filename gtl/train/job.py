"""What a run is before anything computes: plain values that travel, and where things are in its folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gtl import __version__
from gtl.storage import Store

if TYPE_CHECKING:
    from gtl.train.loop import Wish

CHECKPOINTS = "checkpoints"
RESULT = "result.json"
"""In a run's folder, written last: all steps are made and the adapter is exported."""

Notify = Callable[[dict[str, Any]], "Wish | Literal['enough'] | None"]
"""Takes a row of metrics on rank 0; returns what somebody asks of the run, if anything. enough: to save and stop as one
whose last step was made."""


@dataclass(frozen=True)
class Job:
    """What a worker needs, settled once by the launcher."""

    recipe: dict[str, Any]
    name: str
    version: str
    dataset: str
    """Fingerprint of the prepared dataset in the cache."""
    base: str
    """Fingerprint of the base model."""
    dtype: str
    """Of the frozen weights: fp32 or bf16."""
    beside: bool = False
    """Whether others measure the pictures of every look's weights, instead of the workers in turn with training."""
    waits: tuple[str, ...] = ()
    """Metrics of the looks from which the run goes on only when it is let; none: it waits for nobody."""
    code: str = __version__

    @property
    def run(self) -> Store:
        """The run's folder."""
        return Store(f"{self.recipe['storage']['runs']}/{self.name}/{self.version}")
