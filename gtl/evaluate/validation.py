"""Loss on held-out images, at noise and times that never change, so that two values of it can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from gtl.evaluate.outcomes import measure, values_of
from gtl.types import Batch, Losses

if TYPE_CHECKING:
    from torch import Tensor

    from gtl.data.dataset import Dataset
    from gtl.objectives.base import Objective

MAX_IMAGES = 256
"""Held-out images that are looked at; the standard error of more is rarely worth the time."""


class Chunk(NamedTuple):
    """Images of one bucket at times of one stratum: one forward pass."""

    entries: Sequence[int]
    stratum: int
    is_real: bool = True
    """False for a repeat that only keeps the ranks in step."""


class Validation:
    """This rank's share of the held-out images, each at one time of every stratum with one noise."""

    def __init__(self, dataset: Dataset, objective: Objective, *, batch_size: int, rank: int, world: int, seed: int):
        """Choose the images; nothing is read yet.

        Args:
            dataset: The held-out images.
            objective: Draws the noise and the time of an image from a seed of (seed, image, stratum).
            batch_size: Images of one forward pass.
            rank: Of this process among `world`; all have equally many forward passes.
            world: Processes that share the work.
            seed: Of the noise.
        """
        self._dataset, self._objective, self._seed = dataset, objective, seed
        work = list(chunks(dataset, objective.strata, batch_size)) if objective.judged is not None else []
        work += [work[-1]._replace(is_real=False)] * (-len(work) % world) if work else []
        self._work = work[rank::world]

    def run(self, player: Callable[[Batch], Losses | None], device: torch.device) -> dict[str, float]:
        """`val_loss`, and of several strata `val_loss_q1` (the least noisy) and so on; {} without images. Collective.

        And what else is measured of what came of each image.

        Args:
            player: Returns losses summed over samples with the batch's weights.
            device: Where the process group reduces tensors.
        """
        if not self._work:
            return {}
        sums = torch.zeros(self._objective.strata, 2, dtype=torch.float64, device=device)
        outcomes: dict[str, list[Tensor]] = {}
        for chunk in self._work:
            loss, found = self.look(player, chunk)
            for name, rows in found.items():
                outcomes.setdefault(name, []).extend([rows] if chunk.is_real else [])
            if chunk.is_real:
                sums[chunk.stratum] += torch.tensor([loss, len(chunk.entries)], device=device)
        dist.all_reduce(sums)
        means = (sums[:, 0] / sums[:, 1]).tolist()
        measured = values_of(measure(gathered(outcomes))) if outcomes else {}
        return {"val_loss": sum(means) / len(means), **parts_of(means), **measured}

    def look(self, player: Callable[[Batch], Losses | None], chunk: Chunk) -> tuple[float, dict[str, Tensor]]:
        """Of a chunk's images the loss, summed, and what came of each; see `run`."""
        losses = player(self._batch(chunk))
        assert losses is not None
        loss = float(losses.parts.get(self._objective.judged or "", losses.total))
        return loss, {name: rows.cpu() for name, rows in losses.outcomes.items()}

    def _batch(self, chunk: Chunk) -> Batch:
        keys = tuple(self._dataset.entries[i].variants[0] for i in chunk.entries)
        draws = []
        for i, key in zip(chunk.entries, keys, strict=True):
            digest = hashlib.blake2b(f"{self._seed} {key} {chunk.stratum}".encode(), digest_size=8).digest()
            rng = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
            draws.append(self._objective.draw(self._dataset.item(i, 0, 0), rng, chunk.stratum))
        return Batch(self._objective.collate(draws), torch.ones(len(draws)), keys)


def gathered(outcomes: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """All ranks' outcomes. Collective."""
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, {name: list(rows) for name, rows in outcomes.items()})
    return {name: torch.cat([row for share in shares for row in share[name]]) for name in outcomes}


def parts_of(means: Sequence[float]) -> dict[str, float]:
    """What is reported of the strata's means beside the mean of them, which is that of the only one."""
    return {f"val_loss_q{i + 1}": mean for i, mean in enumerate(means)} if len(means) > 1 else {}


def chunks(dataset: Dataset, strata: int, batch_size: int) -> Iterator[Chunk]:
    """The images bucket by bucket in forward passes of at most `batch_size`, each for every stratum."""
    buckets: dict[tuple[int, int], list[int]] = {}
    for i, entry in enumerate(dataset.entries[:MAX_IMAGES]):
        buckets.setdefault(entry.bucket, []).append(i)
    for _, members in sorted(buckets.items()):
        for start in range(0, len(members), batch_size):
            yield from (Chunk(members[start : start + batch_size], stratum) for stratum in range(strata))
