"""The Inception v3 that FID is defined by: the graph of 2015 with 1008 classes, as pytorch-fid's weights name it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from gtl.backbones.extractor import Extractor, load_weights, square, square_text
from gtl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

FILE = "pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of the published file."""
SIDE, DIMENSIONS, CLASSES = 299, 2048, 1008

Kernel = int | tuple[int, int]
Layer = tuple[int, Kernel]
"""A convolution: channels out, and its kernel (height, width)."""
Chain = Sequence[Layer | tuple[Layer, Layer]]
"""Convolutions one after the other; a pair at the end are two of the same input, side by side."""

Row, Column = (1, 7), (7, 1)
FORK = ((384, (1, 3)), (384, (3, 1)))


def block_a(pool: int) -> dict[str, Chain]:
    """Of 35 x 35."""
    return {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
        "branch_pool": [(pool, 1)],
    }


def block_c(width: int) -> dict[str, Chain]:
    """Of 17 x 17."""
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(width, 1), (width, Row), (192, Column)],
        "branch7x7dbl": [(width, 1), (width, Column), (width, Row), (width, Column), (192, Row)],
        "branch_pool": [(192, 1)],
    }


BLOCK_B: dict[str, Chain] = {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}
BLOCK_D: dict[str, Chain] = {
    "branch3x3": [(192, 1), (320, 3)],
    "branch7x7x3": [(192, 1), (192, Row), (192, Column), (192, 3)],
}
BLOCK_E: dict[str, Chain] = {
    "branch1x1": [(320, 1)],
    "branch3x3": [(384, 1), FORK],
    "branch3x3dbl": [(448, 1), (384, 3), FORK],
    "branch_pool": [(192, 1)],
}
BLOCKS: dict[str, tuple[int, Mapping[str, Chain], str]] = {
    "Mixed_5b": (192, block_a(32), "mean"),
    "Mixed_5c": (256, block_a(64), "mean"),
    "Mixed_5d": (288, block_a(64), "mean"),
    "Mixed_6a": (288, BLOCK_B, "shrink"),
    "Mixed_6b": (768, block_c(128), "mean"),
    "Mixed_6c": (768, block_c(160), "mean"),
    "Mixed_6d": (768, block_c(160), "mean"),
    "Mixed_6e": (768, block_c(192), "mean"),
    "Mixed_7a": (768, BLOCK_D, "shrink"),
    "Mixed_7b": (1280, BLOCK_E, "mean"),
    "Mixed_7c": (2048, BLOCK_E, "max"),
}
"""Block -> channels in, branches and pool. That the last one takes the maximum is in the graph, but not in the paper
(Szegedy et al. 2016, arXiv 1512.00567)."""


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Kernel, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H', W']."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """Branches side by side, the pooled one last.

    Of pool "mean" the borders are means of what is inside, as TensorFlow pools; one that shrinks halves the sides with
    the last convolution of every branch and with a pool that has none.
    """

    def __init__(self, inputs: int, branches: Mapping[str, Chain], pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.branches: list[list[list[str]]] = []
        for branch, chain in branches.items():
            channels, steps = inputs, []
            for i, step in enumerate(chain, 1):
                layers = step if isinstance(step[0], tuple) else (step,)
                name = branch if len(chain) == 1 else f"{branch}_{i}"
                names = [f"{name}{letter}" for letter in "ab"] if len(layers) == 2 else [name]
                shrinks = pool == "shrink" and i == len(chain)
                for name, (outputs, kernel) in zip(names, layers, strict=True):
                    self.add_module(name, Conv(channels, outputs, kernel, 2 if shrinks else 1, not shrinks))
                channels = layers[0][0]
                steps.append(names)
            self.branches.append(steps)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C', H', W']."""
        pooled = self._pooled(x)
        outputs = []
        for steps in self.branches:
            flow = pooled if steps == [["branch_pool"]] else x
            for names in steps:
                flow = torch.cat([self.get_submodule(name)(flow) for name in names], 1)
            outputs.append(flow)
        return torch.cat([*outputs, pooled] if self.pool == "shrink" else outputs, 1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "mean":
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return F.max_pool2d(x, 3, 2) if self.pool == "shrink" else F.max_pool2d(x, 3, 1, 1)


class Inception(nn.Module):
    """Pixels [N, 3, 299, 299] from -1 to 1 to features [N, 2048] and logits [N, 1008]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, padded=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.maxpool1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padded=False)
        self.maxpool2 = nn.MaxPool2d(3, 2)
        for name, (inputs, branches, pool) in BLOCKS.items():
            self.add_module(name, Block(inputs, branches, pool))
        self.fc = nn.Linear(DIMENSIONS, CLASSES)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features are means over the last block's positions.

        Logits are without the bias, as the Inception score was first computed (Salimans et al. 2016, arXiv 1606.03498)
        and as torch-fidelity computes it.
        """
        x = pixels
        for layer in list(self.children())[:-1]:
            x = layer(x)
        features = x.mean((2, 3))
        return features, F.linear(features, self.fc.weight)


def find_inception(path: str) -> Path:
    """The file of the weights.

    Raises:
        UserError: there is none.
    """
    file = Path(path).expanduser()
    if not path or not file.is_file():
        found = "a folder" if path and file.is_dir() else "no such file" if path else "no file named"
        raise UserError(f"inception:{path}: {found}; give the path of {FILE}, which pytorch-fid publishes")
    return file


def open_inception(path: str) -> Extractor:
    """The network with pytorch-fid's weights.

    Raises:
        UserError: the file is missing, damaged or of another network.
    """
    file = find_inception(path)
    try:
        data = file.read_bytes()
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = " ".join(str(error).split()).split(". ")[0][:120] or type(error).__name__
        raise UserError(f"{file}: not readable as weights ({reason}); get {FILE} again") from error
    with torch.device("meta"):
        network = Inception()
    load_weights(network, tensors, str(file))
    if (digest := hashlib.sha256(data).hexdigest()) != SHA256:
        log.warning("%s: not the weights that are published (SHA-256 %s); figures compare only among themselves",
                    file, digest[:8])  # fmt: skip
    config = {"network": "inception", "logits": "without bias"}
    return Extractor("inception", square_text(SIDE), DIMENSIONS, network, partial(square, side=SIDE), config)
