"""`builtin:backbone`: a small network that says of the built-in scenes what their captions say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from gtl.backbones.extractor import Extractor, load_weights, square, square_text
from gtl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SIDE = 64
CLASSES = ("shape", "colour")
"""Heads whose combinations are the classes of the logits."""


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut; halves the sides (He et al. 2016, arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H/2, W/2]."""
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class SceneNet(nn.Module):
    """Pixels [N, 3, 64, 64] from -1 to 1 to features [N, D] and logits [N, classes].

    Features are a linear map of the last 4 x 4 positions, not of their mean, so that they also say where things are. On
    them stands one linear head for every attribute.
    """

    def __init__(self, widths: Sequence[int], squeezed: int, dimensions: int, heads: Mapping[str, Sequence[str]]):
        """Random weights.

        Args:
            widths: Channels at 32, 16, 8 and 4 pixels.
            squeezed: Channels of what features are made of.
            dimensions: D.
            heads: Attribute -> its values.
        """
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.stages = nn.Sequential(*(Residual(a, b) for a, b in pairwise(widths)))
        self.squeeze = nn.Sequential(nn.Conv2d(widths[-1], squeezed, 1), nn.ReLU(), nn.Flatten())
        self.features = nn.Linear(squeezed * (SIDE >> len(widths)) ** 2, dimensions)
        self.heads = nn.ModuleDict({name: nn.Linear(dimensions, len(values)) for name, values in heads.items()})

    def embed(self, pixels: Tensor) -> Tensor:
        """The features."""
        return self.features(self.squeeze(self.stages(self.stem(pixels))))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits are log-probabilities of all combinations of `CLASSES`, each judged for itself."""
        features = self.embed(pixels)
        first, second = (self.heads[name](features).log_softmax(1) for name in CLASSES)
        return features, (first[:, :, None] + second[:, None, :]).flatten(1)


def builtin_folder() -> Path:
    """Where the network that comes with gtl lies."""
    return Path(__file__).parent / "builtin" / "backbone"


def open_scenes(folder: Path) -> Extractor:
    """The network in a folder that `write_scenes` wrote.

    Raises:
        UserError: a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise UserError(f"{folder / missing[0]}: missing; `make builtin` makes it")
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        with torch.device("meta"):
            network = SceneNet(**config)
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged ({error}); install gtl again") from error
    load_weights(network, tensors, str(folder / WEIGHTS))
    known = {"network": "scenes", **config}
    return Extractor(
        "builtin:backbone", square_text(SIDE), config["dimensions"], network, partial(square, side=SIDE), known
    )


def write_scenes(network: SceneNet, config: Mapping[str, Any], folder: Path) -> None:
    """Write a network, in half precision, and the arguments that it was made with."""
    from safetensors.torch import save

    tensors = {
        name: tensor.half().contiguous()
        for name, tensor in network.state_dict().items()
        if not name.endswith(".num_batches_tracked")
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    (folder / WEIGHTS).write_bytes(save(tensors))
