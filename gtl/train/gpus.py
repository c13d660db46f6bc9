"""GPUs by name: what they can do at most, what they hold, and how fast they reach each other."""

from __future__ import annotations

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """A kind of GPU. Rates are those of the vendor's data sheets: what is attained is less."""

    flops: float
    """Dense bf16 operations a second."""
    gib: float
    """Memory in GiB as the driver reports it."""
    memory: float
    """Bytes a second from and to its memory."""
    inner: float
    """Bytes a second that it sends to the other GPUs of its machine: NVLink, in one direction, where all of them have
    it, or else PCIe. Bridges between pairs (H100 NVL, A40 and others) reach no further than a pair and do not count."""
    network: float
    """Gbit/s of its share of the machine's network, in machines as the vendor builds them."""


NVLINK5, NVLINK4, NVLINK3 = 900e9, 450e9, 300e9
"""1.8 TB/s, 900 and 600 GB/s in both directions (NVIDIA's pages about NVLink)."""
PCIE5, PCIE4 = 64e9, 32e9
"""16 lanes (PCI-SIG: 32 and 16 GT/s a lane)."""
CX7, CX6 = 400, 200
"""A network card a GPU: ConnectX-7 in DGX H100, H200 and B200, ConnectX-6 in DGX A100 (NVIDIA's data sheets)."""
SHARED = 12.5
"""100 Gbit/s for eight: machines with PCIe cards have no usual network, and clouds give them about as much."""

GPUS = {
    "B200": Gpu(2250e12, 178.4, 8.0e12, NVLINK5, CX7), "GH200": Gpu(989e12, 94.5, 4.0e12, NVLINK4, CX7),
    "H200": Gpu(989e12, 139.8, 4.8e12, NVLINK4, CX7), "H100 NVL": Gpu(835e12, 93.1, 3.9e12, PCIE5, SHARED),
    "H100 PCIe": Gpu(756e12, 79.2, 2.0e12, PCIE5, SHARED), "H100": Gpu(989e12, 79.2, 3.35e12, NVLINK4, CX7),
    "A100-SXM4-40GB": Gpu(312e12, 39.4, 1.555e12, NVLINK3, CX6),
    "A100-PCIE-40GB": Gpu(312e12, 39.4, 1.555e12, PCIE4, SHARED),
    "A100": Gpu(312e12, 79.2, 2.039e12, NVLINK3, CX6), "A10G": Gpu(70e12, 22.1, 0.6e12, PCIE4, SHARED),
    "L40S": Gpu(362e12, 44.4, 0.864e12, PCIE4, SHARED), "L40": Gpu(181e12, 44.4, 0.864e12, PCIE4, SHARED),
    "L4": Gpu(121e12, 22.1, 0.3e12, PCIE4, SHARED), "A40": Gpu(150e12, 44.4, 0.696e12, PCIE4, SHARED),
    "RTX 6000 Ada": Gpu(364e12, 47.4, 0.96e12, PCIE4, SHARED), "RTX 4090": Gpu(165e12, 23.5, 1.008e12, PCIE4, SHARED),
    "RTX 3090": Gpu(71e12, 23.6, 0.936e12, PCIE4, SHARED),
}  # fmt: skip
"""Words of a GPU's name; the first that fits counts."""


def find_gpu(name: str) -> Gpu | None:
    """The table's entry for a GPU's name, None for what is not in it: an RTX A4000 is no A40."""
    return next((gpu for part, gpu in GPUS.items() if re.search(rf"\b{part}\b", name)), None)
