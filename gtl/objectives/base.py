"""What an objective says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from gtl.types import Batch, Item, Losses


class Player(Protocol):
    """One `nn.Module` with its own engine and optimizer. The engine wraps THIS module, so ZeRO's hooks always fire."""

    def __call__(self, batch: Batch) -> Losses | None:
        """The batch's losses, or None when this player sits the step out.

        A player that has a method `after_step(done, total)` is told of every step that its optimizer made, on all
        ranks, and how many of how many that are. What it has of its own beside the model's parts learns too, and is
        kept in checkpoints with its buffers, but not published.
        """
        ...


class Objective(Protocol):
    """What the moving weights learn."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the model that it can train; the first is the one that it is about."""
        ...

    @property
    def strata(self) -> int:
        """Ranges of time that validation looks at one by one; 1 where there is no time."""
        ...

    @property
    def judged(self) -> str | None:
        """The part of its losses that validation reports, free of the weights that training puts on it.

        None: none of them says how good the model is.
        """
        ...

    def draw(self, item: Item, rng: torch.Generator, stratum: int | None = None) -> dict[str, Tensor]:
        """Everything random about one sample (noise, time, dropped caption), as tensors without a batch dimension.

        `rng` is seeded by (seed, step, sample), so the draw does not depend on the number of workers. For validation
        the time is uniform within a stratum, 0 nearest to the clean image, and no caption is dropped.
        """
        ...

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Stack draws to a batch, [B, ...]."""
        ...

    def players(self, parts: dict[str, nn.Module], dtype: torch.dtype) -> dict[str, nn.Module]:
        """The players over the model's live parts, by name; `dtype` is that of the arithmetic, fp32 or bf16."""
        ...
