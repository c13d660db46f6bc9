"""A second network that judges decoded pictures patch by patch, and learns to (PatchGAN, arXiv 1611.07004)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gtl.objectives.adversarial import autocast, critic_loss
from gtl.types import Batch, Losses

if TYPE_CHECKING:
    from gtl.objectives.autoencode import Autoencoder

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


class PatchDiscriminator(nn.Module):
    """Tells patches of pictures from those of what the codec makes of them."""

    def __init__(self, network: Patches, codec: Autoencoder, dtype: torch.dtype) -> None:
        """Trained weights are fp32 whatever the arithmetic's dtype; other than fp32 it runs under autocast."""
        super().__init__()
        self.network = network
        self.dtype = dtype
        self._codec = (codec,)  # not as a submodule, which this player's engine would take for its own

    def forward(self, batch: Batch) -> Losses | None:
        """The batch's share of the mean hinge loss; None until the codec draws something."""
        codec = self._codec[0]
        if not codec.is_judged:
            return None
        real = batch.tensors["pixels"]
        with torch.no_grad():
            drawn, _ = codec.decoded(batch)
        with autocast(real, self.dtype):
            # In one pass, as an engine's gradients need it.
            logits = self.network(torch.cat([real, drawn])).float().flatten(1)
        of_real, of_drawn = logits[: len(real)], logits[len(real) :]
        loss = critic_loss("hinge", of_real, of_drawn).mean(1)
        parts = {"real_logit": of_real.mean(1), "drawn_logit": of_drawn.mean(1)}
        return Losses(batch.share(loss), {name: batch.share(value).detach() for name, value in parts.items()})

    def judge(self, drawn: Tensor) -> Tensor:
        """Mean logit of each decoded picture, [B], differentiable in it and not in the weights."""
        weights = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        with autocast(drawn, self.dtype):
            logits: Tensor = functional_call(self.network, weights, (drawn,))
        return logits.float().flatten(1).mean(1)
