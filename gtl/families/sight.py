"""Networks that see, and heads that say what was seen: what classifiers have beside the networks of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, batch_norm

from gtl.backbones.scenes import SceneNet
from gtl.types import Task

POOLED, MAP = "pooled", "map"
"""Names of features: of a picture [B, D], and of its places [B, C, h, w]."""
STRIDE = 4
"""Pixels between two places that objects are looked for in, as there."""
WIDTH = 64
"""Channels inside a head that looks for objects."""
RARE = -2.19
"""Bias of its heat, so that it begins with a chance of a tenth everywhere (Lin et al. 2017, arXiv 1708.02002)."""


class Scenes(ModelMixin, ConfigMixin):  # type: ignore[misc]  # as it is of diffusers
    """The trunk of `builtin:backbone`, without its own heads."""

    @register_to_config
    def __init__(self, widths: Sequence[int], squeezed: int, dimensions: int) -> None:
        """See `gtl.backbones.scenes.SceneNet`."""
        super().__init__()
        self.network = SceneNet(widths, squeezed, dimensions, {})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels [B, 3, 64, 64], (x - 128) / 128, to features."""
        net = self.network
        places = net.stages(net.stem(pixels))
        return {POOLED: net.features(net.squeeze(places)), MAP: places}


class Pixels(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """No network at all: a picture's own pixels, made smaller. What features have to be better than."""

    @register_to_config
    def __init__(self, side: int = 16) -> None:
        """`side`: of the smaller picture."""
        super().__init__()
        self.side = side

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels [B, 3, H, W] to features."""
        small = adaptive_avg_pool2d(pixels, self.side)
        return {POOLED: small.flatten(1), MAP: small}


class Standard(nn.BatchNorm1d):
    """Numbers less their mean, by their deviation; of a single picture by what those before it had."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, D]."""
        return batch_norm(x, self.running_mean, self.running_var, training=self.training and len(x) > 1)


class Heads(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """One head for each task: linear on a picture's features, or convolutions over those of its places.

    What classes are told by is normalised over the pictures of a batch first (as in linear probes, He et al. 2021,
    arXiv 2111.06377): much of what a network makes of a picture is the same for all.
    """

    @register_to_config
    def __init__(self, tasks: Mapping[str, Mapping[str, Any]], pooled: int, channels: int, stride: int) -> None:
        """Random weights.

        Args:
            tasks: By name the fields of a `gtl.types.Task`.
            pooled: Numbers of a picture's features.
            channels: Of the features of a place.
            stride: Pixels from one place to the next.
        """
        super().__init__()
        self.tasks = {name: Task(**{**fields, "values": tuple(fields["values"])}) for name, fields in tasks.items()}
        self.standard = Standard(pooled, affine=False)
        self.heads = nn.ModuleDict({
            name: nn.Linear(pooled, len(task.values)) if task.kind == "class"
            else finder(channels, len(task.values), stride)
            for name, task in self.tasks.items()
        })  # fmt: skip

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By task: logits [B, classes]; of objects [B, classes + 4, h, w], see `gtl.families.boxes`."""
        found = {}
        pooled = self.standard(features[POOLED].float())
        for name, task in self.tasks.items():
            if task.kind == "class":
                found[name] = self.heads[name](pooled)
            else:
                found[name] = self.heads[name](features[MAP])
        return found


def finder(channels: int, classes: int, stride: int) -> nn.Sequential:
    """What looks for objects in a feature map (CenterNet, Zhou et al. 2019, arXiv 1904.07850).

    The map is enlarged first, at most fourfold and to a place every STRIDE pixels: an object's centre is one place, and
    two that share one can't be told apart.
    """
    last = nn.Conv2d(WIDTH, classes + 4, 1)
    with torch.no_grad():
        cast(Tensor, last.bias)[:classes].fill_(RARE)
    layers: list[nn.Module] = []
    for wide in range(1 + min(2, max(0, (stride // STRIDE).bit_length() - 1))):
        enlarged = [nn.Upsample(scale_factor=2, mode="bilinear")] if wide else []
        before = WIDTH if wide else channels
        layers += [*enlarged, nn.Conv2d(before, WIDTH, 3, padding=1), nn.GroupNorm(8, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, last)
