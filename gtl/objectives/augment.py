"""What pictures go through before a discriminator sees them: differentiable, and drawn from numbers that are given.

Kinds and their strengths are of DiffAugment (Zhao et al. 2020, arXiv 2006.10738); that each happens to a picture with
a probability, and that the probability may follow the discriminator, is of ADA (Karras et al. 2020, arXiv 2006.06676).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOTS = 10
"""Numbers in [0, 1) that decide all about one picture, whichever kinds are asked for."""
SHIFT = 0.125
"""Share of a picture's side that it is moved by at most."""
HOLE = 0.5
"""Side of the square that is cut out, as a share of the picture's."""


def augment(pixels: Tensor, lots: Tensor, kinds: Sequence[str], probability: Tensor | float) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1], each changed as its `lots` [B, LOTS] say; differentiable, twice too.

    Args:
        pixels: The pictures.
        lots: Uniform in [0, 1).
        kinds: Of color, translation and cutout.
        probability: Of each kind for each picture.
    """
    for number, (kind, change) in enumerate(KINDS.items()):
        if kind in kinds:
            happens = lots[:, number] < probability
            pixels = torch.where(spread(happens), change(pixels, lots[:, len(KINDS) :]), pixels)
    return pixels


def recolor(pixels: Tensor, lots: Tensor) -> Tensor:
    """Other brightness (by up to a half), saturation (0 to 2 times) and contrast (half to one and a half times)."""
    brightness, saturation, contrast = (spread(lots[:, number]) for number in range(3))
    pixels = pixels + (brightness - 0.5)
    grey = pixels.mean(1, keepdim=True)
    pixels = grey + (pixels - grey) * (2 * saturation)
    mean = pixels.mean((1, 2, 3), keepdim=True)
    return mean + (pixels - mean) * (contrast + 0.5)


def move(pixels: Tensor, lots: Tensor) -> Tensor:
    """By whole pixels to any side; what comes in is 0, which is grey."""
    height, width = pixels.shape[-2:]
    most = torch.tensor([height * SHIFT + 0.5, width * SHIFT + 0.5], device=pixels.device).long()
    by = (lots[:, 3:5] * (2 * most + 1)).long() - most
    rows = torch.arange(height, device=pixels.device)[None] + by[:, :1]
    columns = torch.arange(width, device=pixels.device)[None] + by[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    samples = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    moved = pixels.movedim(1, -1)[samples, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]]
    return moved.movedim(-1, 1) * inside[:, None].to(pixels.dtype)


def cut_out(pixels: Tensor, lots: Tensor) -> Tensor:
    """0 inside of a square, whose centre is anywhere in the picture."""
    marks = []
    for side, lot in zip(pixels.shape[-2:], lots[:, 5:7].unbind(1), strict=True):
        centre = (lot[:, None] * side).floor()
        places = torch.arange(side, device=pixels.device)[None]
        half = int(side * HOLE + 0.5) // 2
        marks.append((places >= centre - half) & (places < centre + half))
    inside = (marks[0][:, :, None] & marks[1][:, None])[:, None]
    return pixels.masked_fill(inside, 0.0)


def spread(values: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1]."""
    return values[:, None, None, None]


KINDS = {"color": recolor, "translation": move, "cutout": cut_out}
"""In the order in which they happen. A picture's first numbers decide whether each does, the others how."""
