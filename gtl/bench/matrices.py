"""How fast this device multiplies matrices: what the speed of training is compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SIZES = {"cuda": 8192, "cpu": 1024}
"""Rows and columns, by kind of device: a GPU is at its best with so many, and a CPU needs a second for them all."""
IN_A_ROW = {"cuda": 10, "cpu": 2}
"""Products of one timing, by kind of device; several, so that launching them does not count."""
TIMINGS = 7


def matmul_flops(device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> float:
    """Operations a second, by a clock, in products of two square matrices of random numbers; the median of timings.

    Not what a data sheet says: a GPU lowers its clock under such a load, and zeros would not make it do so.
    """
    import torch

    size, num = SIZES[device.type], IN_A_ROW[device.type]
    one, two = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(one)
    seconds = []
    for _ in range(TIMINGS + 1):
        begun = clock()
        for _ in range(num):
            torch.mm(one, two, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(clock() - begun)
    return 2 * size**3 * num / statistics.median(seconds[1:])  # the first one warms up


def utilisation(flops_per_image: float, images_per_second: float, rate: float) -> float:
    """Share of a device's rate, in operations a second, that training makes use of.

    That of Chowdhery et al. 2022 (arXiv 2204.02311, appendix B) with the operations that `gtl.train.flops` counts.
    """
    return flops_per_image * images_per_second / rate
