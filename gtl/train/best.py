"""Which of the looks at a run was the best so far, and whether more of them are worth waiting for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gtl.config import Recipe
from gtl.config.metrics import metric


@dataclass
class Best:
    """The best look by one metric."""

    metric: str
    min_delta: float = 0.0
    """By how much a new best has to be better."""
    patience: int | None = None
    """Looks without a new best that are enough; None: as many as there are."""
    value: float | None = None
    step: int = 0
    """Of the best."""
    waited: int = 0
    """Looks since."""

    def replay(self, rows: Iterable[Mapping[str, Any]], done: int, kept: Collection[int]) -> None:
        """Take in what a run that is resumed after `done` steps had measured, and `kept` weights of which steps.

        A best one without its weights is forgotten, since it could not be published: a later one took its place before
        the run was cut off, and will not come again if it was after the last save.
        """
        for row in rows:
            if row["step"] <= done and self.metric in row:
                self.take(int(row["step"]), row[self.metric])
        if self.step not in kept:
            self.value, self.step = None, 0

    def take(self, step: int, value: float) -> bool:
        """Whether the value is a new best. A model that has learned nothing yet, at step 0, does not count."""
        if step == 0:
            return False
        if math.isfinite(value) and (self.value is None or (value - self.value) * self._sign > self.min_delta):
            self.value, self.step, self.waited = value, step, 0
            return True
        self.waited += 1
        return False

    @property
    def enough(self) -> bool:
        """Whether patience is used up."""
        return self.patience is not None and self.waited >= self.patience

    @property
    def verdict(self) -> dict[str, Any]:
        """For the card: when the best weights were had, and how good they were."""
        value = {"val_loss": self.value} if self.metric == "val_loss" else {"scores": {self.metric: self.value}}
        return {**value, "best_step": self.step}

    @property
    def _sign(self) -> int:
        return metric(self.metric).sign


def best_of(recipe: Recipe) -> Best | None:
    """What a run is judged by, before its first look; None: its last weights are published."""
    stopping = recipe.train.early_stopping
    if recipe.judged_by is None:
        return None
    if stopping is None:
        return Best(recipe.judged_by)
    return Best(stopping.metric, stopping.min_delta, stopping.patience)
