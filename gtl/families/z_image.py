"""Z-Image and Z-Image-Turbo (Z-Image Team 2025, arXiv 2511.22699)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from gtl.families.base import Conditions
from gtl.families.language_transformer import STATES, STATES_MASK, LanguageTransformer

if TYPE_CHECKING:
    from torch import Tensor, nn

PATCH = 2
"""Latents a side of a patch. The transformer has layers for patches of several sizes; its pipeline takes this one."""


class ZImage(LanguageTransformer):
    """One stream of image and text, behind refiners that each sees one of the two; Qwen3 reads the prompt.

    Its time runs from noise to data, and so does the flow that it predicts. Guidance has the scale that it has in all
    families; the pipeline in diffusers counts from 0, so its scale is one less. Turbo is drawn with none: 1 here.
    """

    name: ClassVar[str] = "z_image"
    classes: Mapping[str, tuple[str, str]] = {
        "transformer": ("diffusers", "ZImageTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "Qwen3Model"),
    }
    stacks: ClassVar[tuple[str, ...]] = ("noise_refiner", "context_refiner", "layers")
    head: ClassVar[tuple[str, ...]] = ("all_final_layer",)
    reader: ClassVar[str] = "attention"

    @property
    def patch_size(self) -> int:
        """Latents a side of a patch."""
        return PATCH

    @property
    def max_size(self) -> int:
        """Beyond it there are no positions."""
        _, rows, columns = self.config("transformer")["axes_lens"]
        return int(min(rows, columns)) * self.multiple

    @property
    def width(self) -> int:
        """Channels of a token between the blocks."""
        return int(self.config("transformer")["dim"])

    def embedders(self, main: nn.Module) -> tuple[str, ...]:
        """The projections of patches and of text, the embedding of time, and what image and text are padded with."""
        return *super().embedders(main), "x_pad_token", "cap_pad_token"

    def cross_attentions(self, main: nn.Module) -> tuple[str, ...]:
        """The attention of the blocks behind the refiners."""
        return tuple(name for name in super().cross_attentions(main) if name.startswith("layers."))

    def phrase(self, prompt: str) -> str:
        """The prompt as a user's message that the assistant is about to answer."""
        chat = [{"role": "user", "content": prompt}]
        text: str = self.tokenizers["text_encoder"].apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return text

    def select(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """The states in front of the last layer."""
        return hidden_states[-2]

    def predict(self, main: nn.Module, noisy: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The transformer's output, turned towards noise, for noisy latents [B, C, h, w] at times t [B]."""
        import torch

        states, mask = conditions[STATES], conditions.get(STATES_MASK)
        texts = list(states) if mask is None else [each[kept] for each, kept in zip(states, mask, strict=True)]
        frames = list(noisy.unsqueeze(2))
        flows: list[Tensor] = main(frames, (1000 - t) / 1000, texts, patch_size=PATCH, return_dict=False)[0]
        return -torch.stack(flows).squeeze(2)
