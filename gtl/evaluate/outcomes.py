"""Metrics of what came of each held-out image, said by heads or made by a codec: see `gtl.types.Losses.outcomes`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from gtl.evaluate.estimate import FEWEST, Estimate, estimate, estimate_share

RIGHT, LABELLED = "right.", "labelled."
"""Outcomes of a task with classes, [images]: 1 where what is said is right, and where it is known what is."""
SAID, THERE = "said.", "there."
"""Of one that looks for objects: [images, N, 3] class, score and 1 if there is one, for every object that it has found;
a score of -1 is none. And how many of each class there are, [images, classes]."""
MEANS = ("psnr", "ssim")
"""Outcomes that are metrics of an image, [images], of which all of them have the mean."""
LEVELS = 101
"""Recalls from 0 to 1 at which precision is looked at, as in COCO (Lin et al. 2014, arXiv 1405.0312)."""


class Measured(NamedTuple):
    """One metric of several tasks."""

    whole: Estimate
    """The mean of all tasks."""
    parts: dict[str, float]
    """Of each task, if there are several."""


def measure(outcomes: Mapping[str, Tensor]) -> dict[str, Measured]:
    """The metrics that outcomes are good for, by name."""
    found: dict[str, Measured] = {}
    for metric, mark, score in (("accuracy", RIGHT, accuracy), ("map_50", SAID, mean_precision)):
        scores = {}
        for name, rows in outcomes.items():
            if name.startswith(mark):
                task = name.removeprefix(mark)
                other = outcomes[(LABELLED if mark == RIGHT else THERE) + task]
                if other.sum() > 0:
                    scores[task] = score(rows.double(), other.double())
        if scores:
            found[metric] = mean_of(metric, scores)
    for metric in MEANS:
        if metric in outcomes:
            own = outcomes[metric].double()
            found[metric] = Measured(estimate(metric, float(own.mean()), own.new_empty(0), own - own.mean()), {})
    return found


def values_of(measured: Mapping[str, Measured]) -> dict[str, float]:
    """Of each metric, and of each task by METRIC_TASK."""
    found: dict[str, float] = {}
    for name, (whole, parts) in measured.items():
        found |= {name: whole.value, **{f"{name}_{task}": value for task, value in parts.items()}}
    return found


def mean_of(metric: str, scores: Mapping[str, tuple[float, Tensor]]) -> Measured:
    """The mean of some tasks' values and influences, with its interval."""
    value = sum(own for own, _ in scores.values()) / len(scores)
    influence = torch.stack([own for _, own in scores.values()]).mean(0)
    parts = {task: own for task, (own, _) in scores.items()} if len(scores) > 1 else {}
    nobody = influence.new_empty(0)
    if metric == "accuracy" and len(influence) >= FEWEST:
        share = estimate_share(metric, value, influence, len(influence), len(influence))
        return Measured(replace(share, fake=nobody, real=influence), parts)
    return Measured(estimate(metric, value, nobody, influence), parts)


def accuracy(right: Tensor, labelled: Tensor) -> tuple[float, Tensor]:
    """The share of labelled images that are right, and each image's influence on it."""
    value = float(right.sum() / labelled.sum())
    return value, (right - value * labelled) * len(right) / labelled.sum()


def mean_precision(said: Tensor, there: Tensor) -> tuple[float, Tensor]:
    """Mean over classes of the average precision, and each image's influence: how it is without that image."""
    number = len(said)
    image = torch.arange(number)[:, None].expand(said.shape[:2]).flatten()
    order = said[..., 1].flatten().argsort(descending=True, stable=True)
    order = order[said[..., 1].flatten()[order] >= 0]
    kinds, hits, image = said[..., 0].flatten()[order], said[..., 2].flatten()[order], image[order]
    values = torch.full((number + 1, there.shape[1]), torch.nan, dtype=torch.float64)
    for kind in there.sum(0).nonzero().flatten().tolist():
        own = kinds == kind
        hit, whose, total = hits[own], image[own], there[:, kind].sum()
        values[:, kind] = average_precision(hit, total)
        # Without an image that has neither such an object nor one that was taken for it nothing changes.
        for left in set(whose.tolist()) | set(there[:, kind].nonzero().flatten().tolist()):
            rest = total - there[left, kind]
            values[left + 1, kind] = average_precision(hit[whose != left], rest) if rest > 0 else torch.nan
    means = values.nanmean(1)
    return float(means[0]), (number - 1) * (means[0] - means[1:]).nan_to_num()


def average_precision(hits: Tensor, total: Tensor | float) -> float:
    """Of one class: the mean, over LEVELS recalls, of the best precision at that recall or a higher one.

    Args:
        hits: [N], 1 where an object that was found is there; the surest first.
        total: Objects that there are.
    """
    if not len(hits):
        return 0.0
    right = hits.cumsum(0)
    precision = right / torch.arange(1, len(hits) + 1, dtype=hits.dtype)
    best = precision.flip(0).cummax(0).values.flip(0)
    at = torch.searchsorted((right / total).contiguous(), torch.linspace(0, 1, LEVELS, dtype=hits.dtype) - 1e-9)
    return float(torch.cat([best, best.new_zeros(1)])[at].mean())
