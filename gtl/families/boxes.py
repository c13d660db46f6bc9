"""Objects as points: what a head that looks for them learns, and what it has found (CenterNet, arXiv 1904.07850).

Boxes are [.., 4]: the centre's x and y, width and height, as shares of the picture's sides. A head's output
[B, C + 4, h, w] has the heat of each class, then for every place how far right and down in it the centre is, then width
and height in places.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, max_pool2d

MOST = 100
"""Objects of a picture."""
OVERLAP = 0.7
"""How well a box still fits whose corners are off by the radius within which heat is less wrong than elsewhere."""


class Found(NamedTuple):
    """Objects of one picture, the surest first."""

    boxes: Tensor
    """[N, 4]"""
    classes: Tensor
    """[N]"""
    scores: Tensor
    """[N], from 0 to 1."""


def losses(output: Tensor, boxes: Tensor, classes: Tensor, size_weight: float) -> Tensor:
    """The loss of each picture, [B]: of its heat, over the number of its objects, and of their places and sizes.

    Args:
        output: Of the head.
        boxes: [B, N, 4].
        classes: [B, N]; -1 where there is no object.
        size_weight: Of the error of a size beside that of an offset.
    """
    channels, height, width = output.shape[1] - 4, *output.shape[2:]
    scale = output.new_tensor([width, height])
    centres, sizes = boxes[..., :2] * scale, boxes[..., 2:] * scale
    there = classes >= 0
    cells = torch.minimum(centres.floor().clamp(min=0), scale - 1)
    number = there.sum(1).clamp(min=1)
    goal = heat(cells, sizes, classes, channels, height, width)
    logits = output[:, :channels].float()
    chance = logits.sigmoid()
    hit = (1 - chance).square() * logsigmoid(logits)
    miss = (1 - goal) ** 4 * chance.square() * logsigmoid(-logits)
    of_heat = -torch.where(goal == 1, hit, miss).sum((1, 2, 3)) / number
    at = (cells[..., 1] * width + cells[..., 0]).long()
    told = output[:, channels:].float().flatten(2).gather(2, at[:, None].expand(-1, 4, -1)).transpose(1, 2)
    off = (told[..., :2] - (centres - cells)).abs().sum(-1)
    of_size = (told[..., 2:] - sizes).abs().sum(-1)
    return of_heat + ((off + size_weight * of_size) * there).sum(1) / number


def heat(cells: Tensor, sizes: Tensor, classes: Tensor, channels: int, height: int, width: int) -> Tensor:
    """[B, C, h, w]: 1 at the place of an object's centre, and less around it."""
    ys, xs = torch.meshgrid(
        torch.arange(height, device=cells.device), torch.arange(width, device=cells.device), indexing="ij"
    )
    away = (xs - cells[..., 0, None, None]).square() + (ys - cells[..., 1, None, None]).square()
    spread = (2 * radius(sizes) + 1) / 6
    bumps = torch.exp(-away / (2 * spread.square()[..., None, None]))  # [B, N, h, w]
    own = (classes.clamp(min=-1) + 1)[..., None].expand(-1, -1, height * width)
    goal = bumps.new_zeros(len(cells), channels + 1, height * width)
    return goal.scatter_reduce(1, own, bumps.flatten(2), "amax")[:, 1:].unflatten(2, (height, width))


def radius(sizes: Tensor) -> Tensor:
    """How far, in places, two opposite corners of boxes [.., 2] may both be moved outward or inward at OVERLAP, [..].

    Of the three cases that CornerNet (Law & Deng 2018, arXiv 1808.01244) tells apart this is that of a box which is
    moved as a whole: (w - r)(h - r) of the union 2 w h - (w - r)(h - r).
    """
    total, area = sizes.sum(-1), sizes.prod(-1)
    least = area * (1 - OVERLAP) / (1 + OVERLAP)
    return ((total - (total.square() - 4 * least).clamp(min=0).sqrt()) / 2).clamp(min=0)


def decode(output: Tensor, most: int = MOST) -> list[Found]:
    """What a head has found in each picture: the places that are hotter than those around them."""
    channels, height, width = output.shape[1] - 4, *output.shape[2:]
    chance = output[:, :channels].float().sigmoid()
    peaks = chance * (max_pool2d(chance, 3, 1, 1) == chance)
    scores, at = peaks.flatten(1).topk(min(most, peaks[0].numel()))
    place = at % (height * width)
    told = output[:, channels:].float().flatten(2).gather(2, place[:, None].expand(-1, 4, -1)).transpose(1, 2)
    corner = torch.stack([place % width, place // width], -1)
    scale = output.new_tensor([width, height]).float()
    boxes = torch.cat([(corner + told[..., :2]) / scale, told[..., 2:].clamp(min=0) / scale], -1)
    return [Found(*each) for each in zip(boxes, at // (height * width), scores, strict=True)]


def matched(found: Found, boxes: Tensor, classes: Tensor, overlap: float = 0.5) -> Tensor:
    """Which of the objects that were found are there, [N] of bool; each that is there counts once, for the surest.

    Args:
        found: Of one picture.
        boxes: [M, 4], of what is there.
        classes: [M].
        overlap: How much of both has to be common to them.
    """
    common = overlaps(found.boxes, boxes) * (found.classes[:, None] == classes)
    hits = torch.zeros(len(found.boxes), dtype=torch.bool)
    free = torch.ones(len(boxes), dtype=torch.bool)
    for number in range(len(found.boxes)):
        open_ = common[number].cpu() * free
        if len(boxes) and open_[best := int(open_.argmax())] >= overlap:
            hits[number], free[best] = True, False
    return hits


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Area of the intersection over that of the union, of boxes [N, 4] and [M, 4]: [N, M]."""
    (low, high), (under, over) = (
        (boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2) for boxes in (first, second)
    )
    sides = (torch.minimum(high[:, None], over) - torch.maximum(low[:, None], under)).clamp(min=0)
    common = sides.prod(-1)
    total = first[:, 2:].prod(-1)[:, None] + second[:, 2:].prod(-1) - common
    return common / total.clamp(min=1e-12)
