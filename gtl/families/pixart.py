"""PixArt-alpha (Chen et al. 2023, arXiv 2310.00426) and PixArt-Sigma (Chen et al. 2024, arXiv 2403.04692)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from gtl.families.base import Conditions
from gtl.families.latent_transformer import CrossTransformer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gtl.types import Geometry

TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""That the model reads of a prompt, by its pipeline: the configs do not say it."""
SIZES = ("resolution", "aspect_ratio")
"""Conditions of alpha at 1024 pixels."""


class PixArt(CrossTransformer):
    """A diffusion transformer with cross-attention to T5; it predicts noise, and beside it a variance."""

    name: ClassVar[str] = "pixart"
    classes: Mapping[str, tuple[str, str]] = {
        "transformer": ("diffusers", "PixArtTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "T5EncoderModel"),
    }
    aliases: ClassVar[Mapping[str, str]] = {"Transformer2DModel": "PixArtTransformer2DModel"}
    companions: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer"}

    def check_index(self) -> None:
        """Settle which parts the model has, and how much of a prompt it reads.

        Raises:
            UserError: a part is of another class than the family's.
        """
        super().check_index()
        self.token_limits = {"text_encoder": TOKENS[self.index["_class_name"]]}

    def size_conditions(self, geometry: Geometry) -> Conditions:
        """`resolution` [2], the target's height and width, and `aspect_ratio` [1]; {} for most models.

        Training says what drawing says, the size of the crop, and not the photo's own.
        """
        import torch

        config = self.config("transformer")
        asked = config.get("use_additional_conditions")
        # Left open in the published configs: it is what the model with this many latents a side has.
        if not (config["sample_size"] == 128 if asked is None else asked):
            return {}
        height, width = geometry.target
        values = [float(height), float(width)], [height / width]
        return {name: torch.tensor(value, dtype=torch.float32) for name, value in zip(SIZES, values, strict=True)}

    def predict(self, main: nn.Module, noisy: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The noise in latents [B, C, h, w] at steps t [B]: the first C channels, those of the variance are left out.

        The variance is learned by another loss (arXiv 2102.09672), and samplers have their own.
        """
        text = {name: value for name, value in conditions.items() if name not in SIZES}
        sizes = {name: conditions.get(name) for name in SIZES}
        prediction: Tensor = main(noisy, timestep=t, **text, added_cond_kwargs=sizes, return_dict=False)[0]
        return prediction[:, : noisy.shape[1]]
