"""Stable Diffusion 1.5 and 2.x (Rombach et al. 2021, arXiv 2112.10752)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from gtl.families.base import Conditions
from gtl.families.latent import unstack
from gtl.families.latent_unet import LatentUNet

if TYPE_CHECKING:
    from torch import Tensor, nn


class StableDiffusion(LatentUNet):
    """A latent UNet with one CLIP text encoder."""

    name: ClassVar[str] = "sd"
    classes: Mapping[str, tuple[str, str]] = {
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"),
    }
    companions: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer"}
    editor: ClassVar[str] = "StableDiffusionInstructPix2PixPipeline"
    corrections: ClassVar[Mapping[str, Any]] = {"steps_offset": 1, "clip_sample": False}

    def tokenize(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """`input_ids` [tokens] of each prompt, cut and padded to the model's length.

        The model attends to the padding too, unless its config asks for an `attention_mask`.
        """
        batch = self._read("text_encoder", prompts)
        masked = self.config("text_encoder").get("use_attention_mask", False)
        return unstack({name: batch[name] for name in ("input_ids", "attention_mask")[: 1 + masked]})

    def encode_tokens(self, encoders: Mapping[str, nn.Module], tokens: Mapping[str, Tensor]) -> Conditions:
        """The text encoder's last hidden states, [B, tokens, D]."""
        encoder = cast(Any, encoders["text_encoder"])
        states = encoder(**{name: value.to(encoder.device) for name, value in tokens.items()})[0]
        return {"encoder_hidden_states": states}
