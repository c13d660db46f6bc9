"""Scores from nearest neighbours: do generated images lie where real ones do, and the other way round.

A set covers the balls around its samples that reach to their k-th nearest neighbour. All four scores depend on the
number of images, so that only values of as many compare. Their intervals are about other generated images against
THESE real ones: how a score that hangs on few neighbours varies with both sets has no estimate that we found to hold.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gtl.evaluate.estimate import Estimate, estimate, estimate_share
from gtl.evaluate.features import checked
from gtl.types import UserError

BLOCK = 1024
"""Rows whose distances are in memory at once."""
NOTE = "compares only with as many images; the interval takes the real ones as they are"


def precision(real: Tensor, fake: Tensor, k: int = 3) -> Estimate:
    """Share of the generated images that the real ones cover (Kynkaanniemi et al. 2019, arXiv 1904.06991).

    Args:
        real: Features [N, D] of real images.
        fake: Features [M, D] of generated ones.
        k: Nearest neighbours that a ball reaches to.

    Raises:
        UserError: fewer than k + 2 images on a side, NaN or infinity, or other numbers of features.
    """
    real, fake = _checked("precision", real, fake, k)
    covered = _balls(real, fake, k).inside.any(dim=0).double()
    return estimate_share("precision", float(covered.mean()), covered, len(fake), len(real), NOTE)


def recall(real: Tensor, fake: Tensor, k: int = 3) -> Estimate:
    """Share of the real images that the generated ones cover; arguments and errors as of `precision`.

    Influences are those of leaving a generated image out, which takes its ball away and makes those larger that it
    bounded. On average they give too wide an interval (Efron and Stein 1981), by up to twice in simulations.
    """
    real, fake = _checked("recall", real, fake, k)
    balls = _balls(fake, real, k)
    times = balls.inside.sum(dim=0, dtype=torch.int32)
    nearest = balls.nearest.flatten()
    bounded = (nearest.argsort() // k).split(nearest.bincount(minlength=len(fake)).tolist())
    without = [
        float((times + balls.gained[grown].sum(dim=0, dtype=torch.int32) > balls.inside[sample]).double().mean())
        for sample, grown in enumerate(bounded)
    ]
    influence = (1 - len(fake)) * torch.tensor(without, dtype=torch.float64)
    return estimate_share("recall", float((times > 0).double().mean()), influence, len(real), len(real), NOTE)


def density(real: Tensor, fake: Tensor, k: int = 5) -> Estimate:
    """Mean number of real images' balls that a generated one lies in, over k (Naeem et al. 2020, arXiv 2002.09797).

    1 is expected where both sets come from one distribution; it may be more. Arguments and errors as of `precision`.
    """
    real, fake = _checked("density", real, fake, k)
    times = _balls(real, fake, k).inside.sum(dim=0).double() / k
    return estimate("density", float(times.mean()), times, num_real=len(real), note=NOTE)


def coverage(real: Tensor, fake: Tensor, k: int = 5) -> Estimate:
    """Share of the real images whose ball holds a generated one (Naeem et al. 2020, arXiv 2002.09797).

    1 - (N / (N + M))^k or so is expected of N real and M generated images where both come from one distribution.
    Influences are those of leaving a generated image out, as of `recall`. Arguments and errors as of `precision`.
    """
    real, fake = _checked("coverage", real, fake, k)
    inside = _balls(real, fake, k).inside
    held = inside.sum(dim=1)
    influence = (len(fake) - 1) * inside[held == 1].sum(dim=0).double() / len(real)
    return estimate_share("coverage", float((held > 0).double().mean()), influence, len(real), len(real), NOTE)


class _Balls(NamedTuple):
    inside: Tensor
    """[centres, points] bool: the point is no farther than the centre's k-th nearest other centre."""
    gained: Tensor
    """[centres, points] bool: it is so for the (k + 1)-th only."""
    nearest: Tensor
    """[centres, k]: positions of a centre's nearest others."""


def _balls(centres: Tensor, points: Tensor, k: int) -> _Balls:
    inside, gained, nearest = [], [], []
    for start in range(0, len(centres), BLOCK):
        rows = centres[start : start + BLOCK]
        apart = torch.cdist(rows, centres)
        apart[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = torch.inf  # not its own neighbour
        found = apart.topk(k + 1, largest=False)
        distances = torch.cdist(rows, points)
        within = distances <= found.values[:, k - 1 : k]
        inside.append(within)
        gained.append((distances <= found.values[:, k:]) & ~within)
        nearest.append(found.indices[:, :k])
    return _Balls(torch.cat(inside), torch.cat(gained), torch.cat(nearest))


def _checked(name: str, real: Tensor, fake: Tensor, k: int) -> list[Tensor]:
    real, fake = checked(name, real=real, fake=fake)
    if min(len(real), len(fake)) < k + 2:
        raise UserError(f"{name}: {len(real)} real and {len(fake)} generated images; k = {k} needs {k + 2} of each")
    middle = real.mean(dim=0)  # distances of numbers far from 0 lose digits
    return [real - middle, fake - middle]
