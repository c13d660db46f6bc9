"""Training times: how far on the way to noise each sample is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gtl.config.objectives import Timesteps

if TYPE_CHECKING:
    from torch import Tensor

    from gtl.diffusion.path import NoisePath


def draw_times(config: Timesteps, num: int, rng: torch.Generator, path: NoisePath) -> Tensor:
    """Shares of the way to noise, [num] in [0, 1], for `path.time`.

    Every distribution takes one normal and one uniform number a sample from `rng`, so that what is drawn next does not
    depend on the config.
    """
    uniform = torch.rand(num, generator=rng)
    normal = torch.randn(num, generator=rng)
    u = uniform if config.distribution == "uniform" else torch.sigmoid(config.mean + config.std * normal)
    return shift_times(u, path.shift if config.shift == "model" else config.shift)


def shift_times(u: Tensor, shift: float) -> Tensor:
    """s u / (1 + (s - 1) u), towards noise for s > 1 (Esser et al. 2024, arXiv 2403.03206, section 5.3.2)."""
    return shift * u / (1 + (shift - 1) * u)
