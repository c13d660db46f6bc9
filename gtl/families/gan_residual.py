"""Generator and discriminator of residual blocks with self-attention, as BigGAN's (Brock et al. 2018, 1809.11096).

From there: residual blocks, noise that reaches every block, orthogonal first weights, the sum over places before the
last layer. Self-attention and where it stands are of SAGAN (Zhang et al. 2018, arXiv 1805.08318). Other than there,
features are normalised over groups of channels, for the reason that `gan_conv` gives; there are no classes.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn, zeros
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, relu

from gtl.families.gan_conv import FIRST, GROUP, check_channels, normalize_spectra


class ResidualGenerator(ModelMixin, ConfigMixin):  # type: ignore[misc]  # as it is of diffusers
    """From noise to pictures by residual blocks, each of which doubles the side."""

    @register_to_config
    def __init__(
        self, noise_size: int = 64, channels: Sequence[int] = (128, 64, 64, 32), attention: Sequence[int] = (16,)
    ) -> None:
        """`channels` are those at 4, 8, 16, ... pixels; `attention` is at these sides.

        Raises:
            ValueError: a width is not one of whole groups, or there is no block of such a side.
        """
        super().__init__()
        sides = sides_of(channels, attention)
        self.stem = nn.Linear(noise_size, channels[0] * FIRST**2)
        self.blocks = nn.ModuleList(
            UpBlock(before, after, noise_size, side in attention)
            for before, after, side in zip(channels, channels[1:], sides, strict=False)
        )
        last = channels[-1]
        self.head = nn.Sequential(nn.GroupNorm(last // GROUP, last), nn.ReLU(), nn.Conv2d(last, 3, 3, padding=1))
        draw_orthogonal(self)

    def forward(self, noise: Tensor) -> Tensor:
        """Noise [B, noise_size] to pixels [B, 3, H, W] in [-1, 1]."""
        hidden = self.stem(noise).unflatten(1, (-1, FIRST, FIRST))
        for block in self.blocks:
            hidden = block(hidden, noise)
        return self.head(hidden).tanh()


class ResidualDiscriminator(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """From pictures to how real they look, by residual blocks, each of which halves the side."""

    @register_to_config
    def __init__(
        self, channels: Sequence[int] = (32, 64, 64, 128), attention: Sequence[int] = (16,),
        normalization: str = "spectral",
    ) -> None:  # fmt: skip
        """`channels` are those at the picture's own side, half of it, ...; the last are at 4 pixels.

        Args:
            channels: See above.
            attention: It is at these sides.
            normalization: spectral: of all weights (arXiv 1802.05957); or none.

        Raises:
            ValueError: a width is not one of whole groups, or there is no such normalisation or block of such a side.
        """
        super().__init__()
        if normalization not in ("spectral", "none"):
            raise ValueError(f"normalization: {normalization!r}: expected spectral or none")
        sides = sides_of(channels, attention)[::-1]
        self.stem = nn.Conv2d(3, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            DownBlock(before, after, side in attention)
            for before, after, side in zip(channels, channels[1:], sides, strict=False)
        )
        self.head = nn.Linear(channels[-1], 1)
        draw_orthogonal(self)
        if normalization == "spectral":
            normalize_spectra(self)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to logits [B], above 0 for real ones."""
        hidden = self.stem(pixels)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(relu(hidden).sum((2, 3))).squeeze(1)


class UpBlock(nn.Module):
    """A residual block to twice the side, whose features are scaled and shifted as the noise says."""

    def __init__(self, before: int, after: int, noise_size: int, attends: bool) -> None:
        super().__init__()
        self.first, self.second = Modulated(before, noise_size), Modulated(after, noise_size)
        self.conv_in, self.conv_out = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Conv2d(before, after, 1)
        self.attention = Attention(after) if attends else nn.Identity()

    def forward(self, hidden: Tensor, noise: Tensor) -> Tensor:
        """[B, before, H, W] to [B, after, 2H, 2W]."""
        inner = self.conv_in(interpolate(relu(self.first(hidden, noise)), scale_factor=2))
        inner = self.conv_out(relu(self.second(inner, noise)))
        return self.attention(interpolate(self.shortcut(hidden), scale_factor=2) + inner)


class DownBlock(nn.Module):
    """A residual block to half the side; its attention is before that."""

    def __init__(self, before: int, after: int, attends: bool) -> None:
        super().__init__()
        self.attention = Attention(before) if attends else nn.Identity()
        self.conv_in, self.conv_out = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Conv2d(before, after, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, before, 2H, 2W] to [B, after, H, W]."""
        hidden = self.attention(hidden)
        inner = self.conv_out(relu(self.conv_in(relu(hidden))))
        return avg_pool2d(self.shortcut(hidden) + inner, 2)


class Modulated(nn.Module):
    """Normalised features, scaled and shifted by a linear function of the noise."""

    def __init__(self, channels: int, noise_size: int) -> None:
        super().__init__()
        self.normalize = nn.GroupNorm(channels // GROUP, channels, affine=False)
        self.modulate = nn.Linear(noise_size, 2 * channels)

    def forward(self, hidden: Tensor, noise: Tensor) -> Tensor:
        """[B, C, H, W], the same."""
        scale, shift = self.modulate(noise)[:, :, None, None].chunk(2, 1)
        return self.normalize(hidden) * (1 + scale) + shift


class Attention(nn.Module):
    """Every place looks at all others, at half the resolution; it begins as nothing (arXiv 1805.08318, section 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.key = nn.Conv2d(channels, channels // 8, 1), nn.Conv2d(channels, channels // 8, 1)
        self.value, self.out = nn.Conv2d(channels, channels // 2, 1), nn.Conv2d(channels // 2, channels, 1)
        self.weight = nn.Parameter(zeros(1))  # DeepSpeed can't send one without a dimension

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, H, W], the same."""
        query, key, value = (
            tensor.flatten(2).transpose(1, 2)
            for tensor in (self.query(hidden), max_pool2d(self.key(hidden), 2), max_pool2d(self.value(hidden), 2))
        )
        # Not torch's own attention, whose kernels have no second derivative, which penalties of gradients need.
        seen = (query @ key.transpose(1, 2)).softmax(2) @ value
        return hidden + self.weight * self.out(seen.transpose(1, 2).unflatten(2, hidden.shape[2:]))


def sides_of(channels: Sequence[int], attention: Sequence[int]) -> list[int]:
    """Sides of what a generator's blocks make.

    Raises:
        ValueError: a width cannot be, or attention is wanted at another side.
    """
    check_channels(channels)
    sides = [FIRST * 2 ** (number + 1) for number in range(len(channels) - 1)]
    if odd := [side for side in attention if side not in sides]:
        raise ValueError(f"attention: {odd[0]}: expected some of {', '.join(map(str, sides))}")
    return sides


def draw_orthogonal(network: nn.Module) -> None:
    """BigGAN's first weights."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.orthogonal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
