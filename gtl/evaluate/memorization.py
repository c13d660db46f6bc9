"""Whether a model repeats the images that it was trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gtl.evaluate.estimate import Estimate, estimate_share
from gtl.evaluate.features import checked_units
from gtl.evaluate.intervals import rank_interval

CHANCE = 0.05
"""How often an image that was not trained on may be called near to one that was."""
BLOCK = 256
"""Rows whose distances are in memory at once."""


class Match(NamedTuple):
    """A generated image and the training image that it is nearest to."""

    sample: int
    train: int
    distance: float
    """Cosine distance: 0 of the same direction, 1 of a right angle."""


@dataclass(frozen=True, eq=False)
class Memorization:
    """How near generated images come to training images, measured by how near held-out images come."""

    rank: Estimate
    """Chance that a sample is nearer to its training image than a held-out image is to its own.

    0.5 without memorization, 1 where all samples are copies, below 0.5 where samples are farther away than new images
    are. Its influences are those of samples (`fake`) and held-out images (`real`); its note says what follows.
    """
    near: Estimate | None
    """Share of samples that are nearer than all but 5 % of new images: without memorization at most 0.05.

    None with fewer than 19 held-out images, which have no such percentile. The interval takes them as they are.
    """
    matches: tuple[Match, ...]
    """One of each sample, the nearest first."""

    @property
    def c_t(self) -> float:
        """The normal score of `rank` against 0.5; below -1.64 by chance in 5 % of models that do not copy.

        The test C_T of Meehan et al. 2020 (arXiv 2004.05675) with one cell.
        """
        num_samples, num_held_out = len(self.rank.fake), self.rank.num_real or 0
        deviation = math.sqrt((num_samples + num_held_out + 1) / (12 * num_samples * num_held_out))
        return (0.5 - self.rank.value) / deviation


def memorization(samples: Tensor, train: Tensor, held_out: Tensor) -> Memorization:
    """Compare distances to the nearest training image (the test of Meehan et al. 2020, arXiv 2004.05675).

    Args:
        samples: Features [M, D] of generated images.
        train: Of the images that the model was trained on [N, D].
        held_out: Of images like these that it was not trained on [H, D], none of them among those.

    Raises:
        UserError: a set is empty, has NaN, infinity or a row of zeros, or other numbers of features.
    """
    samples, train, held_out = checked_units("memorization", samples=samples, train=train, held_out=held_out)
    nearest, distances = _nearest(samples, train)
    known = _nearest(held_out, train)[1].sort().values
    order = distances.argsort()
    rows = zip(order.tolist(), nearest[order].tolist(), distances[order].tolist(), strict=True)
    return Memorization(_rank(distances, known), _near(distances, known), tuple(Match(*row) for row in rows))


def _nearest(images: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """Position of each unit vector's nearest of `train`, and its cosine distance."""
    nearest = torch.cat([(block @ train.T).argmax(dim=1) for block in images.split(BLOCK)])
    # 1 less the cosine would leave of a copy's distance what rounding makes of it.
    return nearest, (images - train[nearest]).square().sum(dim=1) / 2


def _rank(distances: Tensor, known: Tensor) -> Estimate:
    # The Mann-Whitney statistic, with its influences of either side (DeLong et al. 1988); equal distances are half.
    ordered = distances.sort().values
    fake, real = 1 - _share_below(known, distances), _share_below(ordered, known)
    value, sizes = float(fake.mean()), (len(distances), len(known))
    low, high = rank_interval(value, *sizes)
    if rank_interval(1.0, *sizes)[0] <= 0.5:
        note = f"cannot tell: of {sizes[0]} samples and {sizes[1]} held-out images not even copies would stand out"
    elif low > 0.5:
        note = "samples are nearer to training images than held-out images are"
    elif high < 0.5:
        note = "samples are farther from training images than held-out images are"
    else:
        note = f"samples are as near to training images as held-out images are, as far as {sizes[1]} of these tell"
    return Estimate("memorization", value, low, high, fake, real, len(known), note)


def _share_below(ordered: Tensor, values: Tensor) -> Tensor:
    below, up_to = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (below + up_to).double() / (2 * len(ordered))


def _near(distances: Tensor, known: Tensor) -> Estimate | None:
    # A conformal p-value (Bates et al. 2021, arXiv 2104.08279): a new image's is below CHANCE that often at most.
    if 1 / (len(known) + 1) > CHANCE:
        return None
    chances = (1 + torch.searchsorted(known, distances, right=True)).double() / (len(known) + 1)
    is_near = (chances <= CHANCE).double()
    return estimate_share("memorization", float(is_near.mean()), is_near, len(is_near))
