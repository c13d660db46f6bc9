"""FLUX.1 dev and schnell (Black Forest Labs 2024, whose report is arXiv 2506.15742)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from gtl.families.base import Conditions
from gtl.families.latent import encode_tokens_of
from gtl.families.latent_transformer import PACKED, LatentTransformer, equal_steps, pack, unpack

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Flux(LatentTransformer):
    """Double blocks, then single blocks, over packed latents; CLIP gives a pooled embedding, T5 the tokens.

    Guidance is distilled into the model: dev reads its scale, schnell has one built in.
    """

    name: ClassVar[str] = "flux"
    classes: Mapping[str, tuple[str, str]] = {
        "transformer": ("diffusers", "FluxTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "T5EncoderModel"),
    }
    companions: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    token_limits: Mapping[str, int] = {"text_encoder_2": 512}
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")

    @property
    def classifier_free(self) -> bool:
        """No."""
        return False

    @property
    def patch_size(self) -> int:
        """Latents a side of a token. The transformer's config counts in tokens, which are packed outside of it."""
        return PACKED

    def encode_tokens(self, encoders: Mapping[str, nn.Module], tokens: Mapping[str, Tensor]) -> Conditions:
        """T5's last hidden states, [B, tokens, D], and CLIP's pooled embedding, `pooled_projections` [B, D1].

        T5 attends to the padding, and so does the transformer.
        """
        clip, t5 = (encode_tokens_of(part, encoders, tokens) for part in self.encoders)
        return {"encoder_hidden_states": t5[0], "pooled_projections": clip.pooler_output}

    def predict(self, main: nn.Module, noisy: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The transformer's raw output for noisy latents [B, C, h, w] at times t [B]."""
        rows, columns = noisy.shape[-2] // PACKED, noisy.shape[-1] // PACKED
        num_tokens = conditions["encoder_hidden_states"].shape[1]
        # The transformer multiplies times by 1000 again.
        packed: Tensor = main(
            pack(noisy), timestep=t / 1000, img_ids=image_ids(rows, columns, noisy.device),
            txt_ids=noisy.new_zeros(num_tokens, 3), **conditions, return_dict=False,
        )[0]  # fmt: skip
        return unpack(packed, rows, columns)

    def sampler_options(self, steps: int) -> dict[str, Any]:
        """The shares of the way to noise."""
        return {"sigmas": equal_steps(steps)}


def image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """Positions [rows columns, 3] of the tokens of an image: 0, row, column. Those of text are all 0."""
    import torch

    axes = [torch.arange(float(num), device=device) for num in (1, rows, columns)]
    return torch.cartesian_prod(*axes)
