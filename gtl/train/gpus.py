"""GPUs by name: what they can do at most, and what they hold."""

from __future__ import annotations

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """A kind of GPU."""

    flops: float
    """Dense bf16 operations a second, from the vendor's data sheets."""
    gib: float
    """Memory in GiB as the driver reports it."""


GPUS = {
    "B200": Gpu(2250e12, 178.4), "GH200": Gpu(989e12, 94.5), "H200": Gpu(989e12, 139.8),
    "H100 NVL": Gpu(835e12, 93.1), "H100 PCIe": Gpu(756e12, 79.2), "H100": Gpu(989e12, 79.2),
    "A100-SXM4-40GB": Gpu(312e12, 39.4), "A100-PCIE-40GB": Gpu(312e12, 39.4), "A100": Gpu(312e12, 79.2),
    "A10G": Gpu(70e12, 22.1), "L40S": Gpu(362e12, 44.4), "L40": Gpu(181e12, 44.4), "L4": Gpu(121e12, 22.1),
    "A40": Gpu(150e12, 44.4), "RTX 6000 Ada": Gpu(364e12, 47.4), "RTX 4090": Gpu(165e12, 23.5),
    "RTX 3090": Gpu(71e12, 23.6),
}  # fmt: skip
"""Words of a GPU's name; the first that fits counts."""


def find_gpu(name: str) -> Gpu | None:
    """The table's entry for a GPU's name, None for what is not in it: an RTX A4000 is no A40."""
    return next((gpu for part, gpu in GPUS.items() if re.search(rf"\b{part}\b", name)), None)
