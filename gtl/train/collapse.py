"""Whether a generator still draws different pictures: mode collapse (Goodfellow 2016, arXiv 1701.00160, section 5.1.1).

How far the drawn pictures of a batch are from each other, as a share of how far real ones are, is `variety` in a run's
rows. Pixels are compared, so it tells when all pictures become one, and not whether rare kinds of pictures are missing:
that is what recall and coverage are for (`gtl.evaluate.neighbours`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from gtl.config import Recipe
from gtl.config.objectives import AdversarialObjective

DRAWN, REAL = "discriminator_spread", "discriminator_spread_real"
VARIETY = "variety"
STEPS = 20
"""That are looked at together: a single batch is small."""
GRACE = 200
"""Steps in which a generator that begins anew, and draws one grey at first, may find its way."""


class Collapse:
    """Watches the rows of a run, and warns once each time that the variety falls below a share."""

    def __init__(self, share: float) -> None:
        """0: never warns."""
        self._share = share
        self._sums: deque[tuple[float, float]] = deque(maxlen=STEPS)
        self._warned, self._risen, self._steps = False, False, 0

    def seen(self, row: Mapping[str, float]) -> dict[str, float]:
        """The row, with its variety where it can be told."""
        if not row.get(REAL):
            return dict(row)
        self._sums.append((row[DRAWN], row[REAL]))
        self._steps += 1
        return {**row, VARIETY: row[DRAWN] / row[REAL]}

    def warning(self) -> str | None:
        """What is to be said now."""
        if len(self._sums) < STEPS:
            return None
        drawn, real = (sum(column) for column in zip(*self._sums, strict=True))
        variety = drawn / real
        self._risen |= variety >= self._share
        fell = variety < self._share and (self._risen or self._steps > GRACE)
        say, self._warned = fell and not self._warned, fell
        return (
            f"the generator draws nearly one picture: variety {variety:.2f} of the real images' over {STEPS} steps, "
            f"below objective.collapse {self._share:g}; try a lower train.learning_rate, objective.r1, or "
            "objective.augmentation"
            if say else None
        )  # fmt: skip


def collapse_of(recipe: Recipe) -> Collapse:
    """What watches a recipe's run."""
    objective = recipe.objective
    return Collapse(objective.collapse if isinstance(objective, AdversarialObjective) else 0.0)
