"""A discriminator that sees with a network that has learned to tell photographs apart: VGG19 (arXiv 1409.1556).

Its first layers are those that torchvision calls `features[:28]`, up to the fourth pooling, after which a linear layer
over 4x4 places fits pictures of 64 pixels. Cut at 27, as some have it, that layer would not fit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, load, nn, tensor

from gtl.families.gan_conv import STD
from gtl.types import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

WIDTHS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, 256, "pool", 512, 512, 512, 512, "pool")
"""Channels of the convolutions, and where the side is halved."""
SHRINKS = 16
"""So many times smaller than a picture the last features are."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels in [0, 1], as torchvision's networks expect them to be normalised."""


class VggDiscriminator(ModelMixin, ConfigMixin):  # type: ignore[misc]  # as it is of diffusers
    """How real pictures look by the features of VGG19, of which `discriminator_depth` can freeze all twelve layers."""

    mean_pixel: Tensor
    deviation: Tensor

    @register_to_config
    def __init__(self, side: int = 64) -> None:
        """`side` of the pictures, in pixels.

        Raises:
            ValueError: it is not a multiple of 16.
        """
        super().__init__()
        if side < SHRINKS or side % SHRINKS:
            raise ValueError(f"side: {side}: expected a multiple of {SHRINKS}")
        self.stem = nn.Identity()
        blocks: list[nn.Sequential] = []
        before = 3
        for width in WIDTHS:
            if isinstance(width, str):
                blocks[-1].append(nn.MaxPool2d(2))
                continue
            blocks.append(nn.Sequential(nn.Conv2d(before, width, 3, padding=1), nn.ReLU()))
            before = width
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(before * (side // SHRINKS) ** 2, 1)
        nn.init.normal_(self.head.weight, std=STD)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean_pixel", tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", tensor(DEVIATION).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to logits [B], above 0 for real ones."""
        hidden = (pixels / 2 + 0.5 - self.mean_pixel) / self.deviation
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.flatten(1)).squeeze(1)

    def load_features(self, file: Path) -> None:
        """Take the features from the weights that torchvision publishes, such as `vgg19-dcbb9e9d.pth`.

        Raises:
            UserError: the file is none of those.
        """
        tensors = read_weights(file)
        convolutions = [layer for layer in self.blocks.modules() if isinstance(layer, nn.Conv2d)]
        for position, layer in zip(positions(), convolutions, strict=True):
            for name, parameter in layer.named_parameters():
                key = f"features.{position}.{name}"
                if key not in tensors:
                    raise UserError(f"{file}: no {key} in it; expected torchvision's weights of VGG19")
                if tensors[key].shape != parameter.shape:
                    found, wanted = list(tensors[key].shape), list(parameter.shape)
                    raise UserError(f"{file}: {key} has shape {found}; VGG19's is {wanted}")
                parameter.data = tensors[key].to(parameter.device, parameter.dtype)


def positions() -> list[int]:
    """Of the convolutions among torchvision's `features`, each of which a ReLU follows."""
    found, position = [], 0
    for width in WIDTHS:
        if not isinstance(width, str):
            found.append(position)
        position += 1 if isinstance(width, str) else 2
    assert position == 28
    return found


def read_weights(file: Path) -> Mapping[str, Tensor]:
    """A state dict that torch saved; only tensors are read, and no code of the file runs.

    Raises:
        UserError: the file is missing, or none.
    """
    try:
        state = load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; torchvision publishes it as vgg19-dcbb9e9d.pth") from None
    except Exception as error:  # torch refuses what is wrong in many ways
        raise UserError(f"{file}: not a file of weights: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file}: holds no weights by name; a state dict is needed")
    return state
