"""Generator and discriminator of convolutions (DCGAN, Radford et al. 2015, arXiv 1511.06434).

Where DCGAN normalises over the batch these normalise over groups of channels (Wu & He 2018, arXiv 1803.08494): what is
learned of a picture then does not depend on which others share its micro-batch, nor on how many workers there are.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

FIRST = 4
"""Side of the smallest feature maps."""
GROUP = 8
"""Channels that are normalised together."""
SLOPE = 0.2
"""Of the discriminator's leaky ReLU, as in DCGAN."""
STD = 0.02
"""Of the first weights, as in DCGAN."""


class ConvGenerator(ModelMixin, ConfigMixin):  # type: ignore[misc]  # as it is of diffusers
    """From noise to pictures by transposed convolutions."""

    @register_to_config
    def __init__(
        self, noise_size: int = 64, channels: Sequence[int] = (256, 128, 64, 32), normalization: str = "group"
    ) -> None:
        """`channels` are those at 4, 8, 16, ... pixels; the last are at the picture's own size.

        Args:
            noise_size: Numbers that a picture is drawn from.
            channels: See above.
            normalization: Of features: group; or pixel: of each place by itself (Karras et al. 2017, arXiv 1710.10196).

        Raises:
            ValueError: a width is not one of whole groups, or there is no such normalisation.
        """
        super().__init__()
        check_channels(channels)
        if normalization not in ("group", "pixel"):
            raise ValueError(f"normalization: {normalization!r}: expected group or pixel")
        normalize = normalize_groups if normalization == "group" else PixelNorm
        self.stem = nn.Linear(noise_size, channels[0] * FIRST**2)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                normalize(before), nn.ReLU(), nn.ConvTranspose2d(before, after, 4, 2, 1)
            )
            for before, after in zip(channels, channels[1:], strict=False)
        )  # fmt: skip
        self.head = nn.Sequential(normalize(channels[-1]), nn.ReLU(), nn.Conv2d(channels[-1], 3, 3, padding=1))
        draw_weights(self)

    def forward(self, noise: Tensor) -> Tensor:
        """Noise [B, noise_size] to pixels [B, 3, H, W] in [-1, 1]."""
        hidden = self.stem(noise).unflatten(1, (-1, FIRST, FIRST))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden).tanh()


class ConvDiscriminator(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """From pictures to how real they look, by strided convolutions."""

    @register_to_config
    def __init__(self, channels: Sequence[int] = (32, 64, 128, 256), normalization: str = "spectral") -> None:
        """`channels` are those at the picture's own size, half of it, ...; the last are at 4 pixels.

        Args:
            channels: See above.
            normalization: spectral: of all weights (Miyato et al. 2018, arXiv 1802.05957); group: of features; none.

        Raises:
            ValueError: a width is not one of whole groups, or there is no such normalisation.
        """
        super().__init__()
        check_channels(channels)
        if normalization not in ("spectral", "group", "none"):
            raise ValueError(f"normalization: {normalization!r}: expected spectral, group or none")
        self.stem = nn.Sequential(nn.Conv2d(3, channels[0], 3, padding=1), nn.LeakyReLU(SLOPE))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 4, 2, 1),
                nn.GroupNorm(after // GROUP, after) if normalization == "group" else nn.Identity(),
                nn.LeakyReLU(SLOPE),
            )
            for before, after in zip(channels, channels[1:], strict=False)
        )
        self.head = nn.Linear(channels[-1] * FIRST**2, 1)
        draw_weights(self)
        if normalization == "spectral":
            normalize_spectra(self)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to logits [B], above 0 for real ones."""
        hidden = self.stem(pixels)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.flatten(1)).squeeze(1)


def normalize_groups(channels: int) -> nn.Module:
    """Over groups of channels, with a scale and a shift of each channel's own."""
    return nn.GroupNorm(channels // GROUP, channels)


class PixelNorm(nn.Module):
    """Each place's features are brought to length 1 on average; nothing is learned, so what all share is kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, H, W], the same."""
        return hidden * (hidden.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def check_channels(channels: Sequence[int]) -> None:
    """Refuse widths that cannot be.

    Raises:
        ValueError: there is one.
    """
    if len(channels) < 2:
        raise ValueError(f"channels: {list(channels)}: expected two or more, of 4, 8, ... pixels")
    if odd := [width for width in channels if width < 1 or width % GROUP]:
        raise ValueError(f"channels: {odd[0]}: expected a multiple of {GROUP}")


def side_of(channels: Sequence[int]) -> int:
    """Side in pixels of the pictures of a network with so many widths."""
    return FIRST << len(channels) >> 1


def draw_weights(network: nn.Module) -> None:
    """DCGAN's first weights: normal, of standard deviation 0.02."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(module.weight, std=STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def normalize_spectra(network: nn.Module) -> None:
    """Divide every weight of a network by its largest singular value, found by power iteration as it trains."""
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            spectral_norm(module)
