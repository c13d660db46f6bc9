"""Stable Diffusion XL base 1.0 (Podell et al. 2023, arXiv 2307.01952)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from gtl.families.base import Conditions
from gtl.families.files import INDEX, components
from gtl.families.latent import encode_tokens_of
from gtl.families.latent_unet import LatentUNet
from gtl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gtl.types import Geometry


class StableDiffusionXL(LatentUNet):
    """A latent UNet with two CLIP text encoders, which is also told the size and the crop of a picture."""

    name: ClassVar[str] = "sdxl"
    classes: Mapping[str, tuple[str, str]] = {
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    }
    companions: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    editor: ClassVar[str] = "StableDiffusionXLInstructPix2PixPipeline"

    def check_index(self) -> None:
        """Settle which parts the model has.

        Raises:
            UserError: one is of another class than the family's, or the model is a refiner.
        """
        if self.index.get("requires_aesthetics_score") or "text_encoder" not in components(self.index):
            raise UserError(
                f"{self.folder / INDEX}: a refiner, which only finishes what a base model began; "
                "use a base model, such as stabilityai/stable-diffusion-xl-base-1.0"
            )
        super().check_index()

    def encode_tokens(self, encoders: Mapping[str, nn.Module], tokens: Mapping[str, Tensor]) -> Conditions:
        """Both encoders' penultimate hidden states side by side, [B, tokens, D1 + D2], and the second's pooled, [B, D].

        Every prompt goes to both encoders, and both attend to the padding.
        """
        import torch

        one, two = (encode_tokens_of(part, encoders, tokens, output_hidden_states=True) for part in self.encoders)
        states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        return {"encoder_hidden_states": states, "text_embeds": two.text_embeds}

    def unconditional(self, empty: Conditions) -> Conditions:
        """Zeros, unless `force_zeros_for_empty_prompt` is off in model_index.json.

        Only for drawing: dropped captions are the encoded empty prompt in training.
        """
        if not self.index.get("force_zeros_for_empty_prompt", True):
            return empty
        return {name: value.new_zeros(value.shape) for name, value in empty.items()}

    def size_conditions(self, geometry: Geometry) -> Conditions:
        """`time_ids` [6]: original height and width, top and left of the crop, target height and width, in pixels."""
        import torch

        sizes = (*geometry.original, *geometry.crop, *geometry.target)
        return {"time_ids": torch.tensor(sizes, dtype=torch.float32)}

    def predict(self, main: nn.Module, noisy: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The UNet's raw output for noisy latents [B, C, h, w] at steps t [B]."""
        added = {name: conditions[name] for name in ("text_embeds", "time_ids")}
        states = conditions["encoder_hidden_states"]
        prediction: Tensor = main(noisy, t, states, added_cond_kwargs=added, return_dict=False)[0]
        return prediction
