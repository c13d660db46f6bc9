"""A discriminator that sees with any network of transformers that has learned to (as in arXiv 2112.09130)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn, tensor
from torch.nn.functional import interpolate

from gtl.families.gan_conv import STD
from gtl.types import UserError

PLAIN = (0.5, 0.5, 0.5)
"""Mean and deviation of pixels in [0, 1] where a network comes without its own: then it sees them in [-1, 1]."""


class BackboneDiscriminator(ModelMixin, ConfigMixin):  # type: ignore[misc]  # as it is of diffusers
    """How real pictures look by the features of a ViT, DINOv2, ResNet, ConvNeXt and so on, with a linear head.

    The network is one block: `discriminator_depth: 1` freezes it, so that the head alone learns.
    """

    mean_pixel: Tensor
    deviation_pixel: Tensor

    @register_to_config
    def __init__(
        self, backbone: dict[str, Any], side: int = 64, mean: tuple[float, ...] = PLAIN,
        deviation: tuple[float, ...] = PLAIN,
    ) -> None:  # fmt: skip
        """Random weights.

        Args:
            backbone: A config of transformers, with its `model_type`.
            side: Of the pictures, in pixels; they are resized to the network's own `image_size`, if it has one.
            mean: Of the network's pixels in [0, 1], by colour.
            deviation: Theirs.

        Raises:
            ValueError: there is no such network.
        """
        from transformers import AutoConfig, AutoModel

        super().__init__()
        config = AutoConfig.for_model(**backbone)
        self.stem = nn.Identity()
        self.blocks = nn.ModuleList([AutoModel.from_config(config)])
        found = getattr(config, "image_size", None)
        self._size = found if isinstance(found, int) else None
        width = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]
        self.head = nn.Linear(width, 1)
        nn.init.normal_(self.head.weight, std=STD)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean_pixel", tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation_pixel", tensor(deviation).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to logits [B], above 0 for real ones."""
        seen = (pixels / 2 + 0.5 - self.mean_pixel) / self.deviation_pixel
        if self._size is not None and self._size != seen.shape[-1]:
            seen = interpolate(seen, (self._size, self._size), mode="bilinear", antialias=True)
        hidden = self.blocks[0](pixel_values=seen).last_hidden_state
        features = hidden.flatten(2).mean(2) if hidden.dim() == 4 else hidden.mean(1)
        logits: Tensor = self.head(features)
        return logits.squeeze(1)


def with_backbone(folder: Path, side: int = 64) -> BackboneDiscriminator:
    """A discriminator over a trained network in a folder of transformers, with the pixels that it is used to.

    Raises:
        UserError: there is no network that sees.
    """
    from transformers import AutoImageProcessor, AutoModel

    try:
        network = AutoModel.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no network of transformers: {' '.join(str(error).split())[:200]}") from error
    if network.main_input_name != "pixel_values":
        raise UserError(f"{folder}: {type(network).__name__} reads {network.main_input_name}; one is needed that sees")
    mean, deviation = PLAIN, PLAIN
    if (folder / "preprocessor_config.json").is_file():
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        mean, deviation = tuple(processor.image_mean), tuple(processor.image_std)
    config = {key: value for key, value in network.config.to_dict().items() if not key.startswith("_")}
    made = BackboneDiscriminator(config, side, mean, deviation)
    made.blocks[0].load_state_dict(network.state_dict())
    return made
