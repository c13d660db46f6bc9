"""How far two pictures are apart for a network that has learned to see (Zhang et al. 2018, arXiv 1801.03924)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from gtl.backbones.scenes import SceneNet
from gtl.objectives.features import recorded

VGG = "vgg19:"
VGG_LAYERS = ("blocks.1.1", "blocks.3.1", "blocks.7.1", "blocks.11.1")
"""The last of VGG19's layers before each pooling, as LPIPS has them of VGG16, behind their ReLU."""
EPSILON = 1e-10
"""Beside a feature's norm, as LPIPS has it."""


class Perceptual(nn.Module):
    """A frozen network, and the distance of two pictures in it."""

    def __init__(self, network: nn.Module, layers: tuple[str, ...]) -> None:
        """`layers` are the modules of the network whose outputs [B, C, h, w] are compared."""
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.layers = layers

    def train(self, mode: bool = True) -> Perceptual:
        """The network never learns, and its batch norms keep their statistics."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, drawn: Tensor, wanted: Tensor) -> Tensor:
        """Distance of each pair of pictures [B, 3, H, W] in [-1, 1], [B] in fp32; differentiable in the first one.

        The sum over layers of the mean, over places, of the squared distance of features that are of unit length over
        channels (equation 1 with all weights 1).
        """
        with torch.no_grad():
            theirs = self._features(wanted)
        pairs = zip(self._features(drawn), theirs, strict=True)
        return torch.stack([(unit(a) - unit(b)).square().sum(1).flatten(1).mean(1) for a, b in pairs]).sum(0)

    def _features(self, pixels: Tensor) -> list[Tensor]:
        # As the network is kept, which may be bf16.
        like = next(self.network.parameters())
        with recorded(self.network, self.layers) as found, torch.autocast(pixels.device.type, enabled=False):
            self.network(pixels.to(like.dtype))
        return [each.float() for each in found]


def unit(features: Tensor) -> Tensor:
    """Features [B, C, h, w] of unit length at every place."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + EPSILON)


def open_perceptual(spec: str) -> Perceptual:
    """The network that a recipe names, for pictures of any size.

    Args:
        spec: See `gtl.config.objectives.AutoencodeObjective`.

    Raises:
        UserError: its file is missing, or none of that network.
    """
    if spec.startswith(VGG):
        from gtl.families.gan_features import VggDiscriminator

        vgg = VggDiscriminator()
        vgg.load_features(Path(spec.removeprefix(VGG)))
        vgg.head = nn.Identity()
        return Perceptual(vgg, VGG_LAYERS)
    from gtl.backbones.scenes import builtin_folder, open_scenes

    scenes = open_scenes(builtin_folder()).network
    assert isinstance(scenes, SceneNet)
    return Perceptual(nn.Sequential(scenes.stem, *scenes.stages), tuple(map(str, range(1 + len(scenes.stages)))))
