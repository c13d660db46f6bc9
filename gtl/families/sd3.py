"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from gtl.families.base import Conditions
from gtl.families.latent import encode_tokens_of
from gtl.families.latent_transformer import LatentTransformer

if TYPE_CHECKING:
    from torch import Tensor, nn

T5 = "text_encoder_3"
T5_TOKENS = 256
"""That the model reads of a prompt, and the number of zeros where T5 is not there."""


class StableDiffusion3(LatentTransformer):
    """A multimodal diffusion transformer with two CLIP text encoders, and T5 as a third that may be left out."""

    name: ClassVar[str] = "sd3"
    classes: Mapping[str, tuple[str, str]] = {
        "transformer": ("diffusers", "SD3Transformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        T5: ("transformers", "T5EncoderModel"),
    }
    optional: ClassVar[frozenset[str]] = frozenset({T5})
    companions: ClassVar[Mapping[str, str]] = {
        "text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", T5: "tokenizer_3",
    }  # fmt: skip
    token_limits: Mapping[str, int] = {T5: T5_TOKENS}

    @property
    def max_size(self) -> int:
        """Beyond it there are no position embeddings."""
        return int(self.config("transformer")["pos_embed_max_size"]) * self.multiple

    def encode_tokens(self, encoders: Mapping[str, nn.Module], tokens: Mapping[str, Tensor]) -> Conditions:
        """CLIP's penultimate hidden states side by side, filled up with zeros, then T5's last, [B, tokens, D].

        `pooled_projections` [B, D1 + D2] are what the two CLIP encoders say of the whole prompt (section 4). All
        encoders attend to the padding.
        """
        import torch
        from torch.nn.functional import pad

        clip = [
            encode_tokens_of(part, encoders, tokens, output_hidden_states=True)
            for part in self.encoders if part != T5
        ]  # fmt: skip
        states = torch.cat([output.hidden_states[-2] for output in clip], dim=-1)
        width = int(self.config("transformer")["joint_attention_dim"])
        if T5 in self.encoders:
            long = encode_tokens_of(T5, encoders, tokens)[0]
        else:
            long = states.new_zeros(len(states), T5_TOKENS, width)
        return {
            "encoder_hidden_states": torch.cat([pad(states, (0, width - states.shape[-1])), long], dim=-2),
            "pooled_projections": torch.cat([output.text_embeds for output in clip], dim=-1),
        }

    def predict(self, main: nn.Module, noisy: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The transformer's raw output for noisy latents [B, C, h, w] at times t [B]."""
        prediction: Tensor = main(noisy, timestep=t, **conditions, return_dict=False)[0]
        return prediction
