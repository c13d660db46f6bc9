"""Sana 1.0 and 1.5 (Xie et al. 2024, arXiv 2410.10629; 2025, arXiv 2501.18427)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from gtl.families.base import Conditions
from gtl.families.latent import unstack
from gtl.families.latent_transformer import CrossTransformer

if TYPE_CHECKING:
    from torch import Tensor, nn

TOKENS = 300
"""That the transformer reads of a prompt."""
PLAIN = "\0"
"""What a text begins with that is read without the instruction."""


class Sana(CrossTransformer):
    """A transformer with linear attention over latents of a deep-compression autoencoder; it predicts a flow.

    Gemma reads an instruction in front of every prompt (section 2.3). Negative and empty prompts have none.
    """

    name: ClassVar[str] = "sana"
    classes: Mapping[str, tuple[str, str]] = {
        "transformer": ("diffusers", "SanaTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderDC"),
        "text_encoder": ("transformers", "Gemma2Model"),
    }
    companions: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer"}

    @property
    def latent_scale(self) -> int:
        """Pixels a side of a latent."""
        return int(2 ** (self.levels("vae", "encoder_block_out_channels") - 1))

    def encode_images(self, codec: nn.Module | None, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] to their one latent: mean [B, C, h, w]."""
        vae = cast(Any, codec)
        return {"mean": vae.encode(pixels.to(vae.dtype)).latent}

    def sample_latents(self, moments: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """The latents, scaled for the model; the autoencoder has no distribution to draw from."""
        _, scaling = self.statistics(noise)
        return moments["mean"] * scaling

    @functools.cached_property
    def instruction(self) -> str:
        """What Gemma reads in front of a prompt; it is in no config, but in the pipeline."""
        from diffusers.pipelines.sana.pipeline_sana import SanaPipeline

        return "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)

    def negative_text(self, prompt: str) -> str:
        """The prompt, marked as one without the instruction."""
        return PLAIN + prompt if prompt else prompt

    def tokenize(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """`input_ids` and `attention_mask` [tokens] of each prompt, in lower case and behind the instruction.

        `positions` [TOKENS] are those that the transformer reads: the first, and as many as there are behind the
        instruction, or without one the foremost. An empty prompt has none, as in the model's own training.
        """
        import torch

        tokenizer = self.tokenizers["text_encoder"]
        # Both count the first token, and the last of the instruction is counted as the prompt's, as in the pipeline.
        length = len(tokenizer.encode(self.instruction)) + TOKENS - 2
        last = [0, *range(length - TOKENS + 1, length)]
        texts, positions = [], []
        for prompt in prompts:
            plain = not prompt or prompt.startswith(PLAIN)
            text = prompt.removeprefix(PLAIN).lower().strip()
            texts.append(text if plain else self.instruction + text)
            positions.append(list(range(TOKENS)) if plain else last)
        # On the right, where causal attention lets it change nothing; Gemma's own is on the left.
        batch = tokenizer(
            texts, padding="max_length", padding_side="right", max_length=length, truncation=True, return_tensors="pt"
        )
        read = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return unstack({**read, "positions": torch.tensor(positions)})

    def encode_tokens(self, encoders: Mapping[str, nn.Module], tokens: Mapping[str, Tensor]) -> Conditions:
        """Gemma's last hidden states at the positions, [B, TOKENS, D], and `encoder_attention_mask` [B, TOKENS]."""
        import torch

        whole = super().encode_tokens(encoders, {name: tokens[name] for name in ("input_ids", "attention_mask")})
        positions = tokens["positions"].to(whole["encoder_attention_mask"].device)
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        return {name: value[rows, positions] for name, value in whole.items()}

    def predict(self, main: nn.Module, noisy: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The flow in latents [B, C, h, w] at times t [B]."""
        scale = self.config("transformer").get("timestep_scale", 1.0)
        prediction: Tensor = main(noisy, timestep=t * scale, **conditions, return_dict=False)[0]
        return prediction
