"""A network that judges pictures patch by patch (PatchGAN, arXiv 1611.07004)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 64
"""Channels of the first layer."""
HALVINGS = 3
"""So often the side is halved: a patch is 70 pixels wide then, as far as the picture goes."""
GROUPS = 32


class Patches(nn.Sequential):
    """Pixels [B, 3, H, W] in [-1, 1] to logits [B, h, w], above 0 for patches of real pictures.

    Normalised by groups instead of batches, so that a picture's logits do not depend on those beside it.
    """

    def __init__(self, seed: int = 0) -> None:
        """Weights are drawn by the seed, N(0, 0.02) as in the paper."""
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTH, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = WIDTH
        for halving in range(1, HALVINGS + 1):
            wider = WIDTH * min(2**halving, 8)
            stride = 2 if halving < HALVINGS else 1
            layers += [nn.Conv2d(width, wider, 4, stride, 1), nn.GroupNorm(GROUPS, wider), nn.LeakyReLU(0.2)]
            width = wider
        super().__init__(*layers, nn.Conv2d(width, 1, 4, 1, 1))
        rng = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                with torch.no_grad():
                    module.weight.copy_(0.02 * torch.randn(module.weight.shape, generator=rng))
                    assert module.bias is not None
                    module.bias.zero_()

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = super().forward(pixels)
        return logits.squeeze(1)
