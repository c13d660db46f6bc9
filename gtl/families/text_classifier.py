"""Heads on what a frozen text encoder makes of captions.

A folder has the encoder of a diffusion model as `backbone`, its `tokenizer`, and `head`; `gtl heads --part` writes it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from gtl.families.classifier import HEAD, Classifier
from gtl.families.latent import read_tokenizer
from gtl.families.layout import DiffusersLayout
from gtl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gtl.families.base import Conditions

READERS = {
    name: "transformers"
    for name in ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "Qwen3Model", "Gemma2Model")
}
"""Text encoders whose last hidden states are of the whole network; the others of `TOKENIZERS` have more on top."""
LENGTH = 512
"""Tokens of a text at most, where its tokenizer names no fewer."""
SIDE = 8
"""Pictures are not looked at; this is what their sizes are multiples of."""


class TextClassifier(Classifier):
    """A text encoder, of which nothing moves, and heads."""

    name: ClassVar[str] = "text_classifier"
    codec: ClassVar[str | None] = None
    encoders: tuple[str, ...] = ("backbone",)
    companions: ClassVar[Mapping[str, str]] = {"backbone": "tokenizer"}
    is_frozen = True
    multiple = SIDE
    max_size = None
    default_size = (SIDE, SIDE)

    def check_index(self) -> None:
        """Settle which text encoder the model has.

        Raises:
            UserError: it is of a class that is not known.
        """
        self.classes = {"backbone": self._class_of("backbone", READERS), "head": self._class_of("head", HEAD)}

    @functools.cached_property
    def tokenizers(self) -> dict[str, Any]:
        """The text encoder's."""
        return {"backbone": read_tokenizer(self.classes["backbone"][1], self.folder / self.companions["backbone"])}

    def fingerprint(self, *parts: str) -> str:
        """See `Family`."""
        return DiffusersLayout.fingerprint(self, *parts)

    def encode_images(self, codec: nn.Module | None, pixels: Tensor) -> dict[str, Tensor]:
        """None.

        Raises:
            UserError: always.
        """
        raise UserError(f"{self.folder}: its heads read captions, and look at no pictures")

    def encode_prompts(self, encoders: Mapping[str, nn.Module], prompts: Sequence[str]) -> list[Conditions]:
        """`pooled` [2 D] of each text: mean and maximum of its tokens' last hidden states.

        The mean is what sentences are told by best without training of T5's encoder (Ni et al. 2022, arXiv 2108.08877).
        """
        return [{"pooled": row} for row in pooled(encoders["backbone"], self.tokenizers["backbone"], prompts)]

    def blocks(self, main: nn.Module) -> list[tuple[str, ...]]:
        """None that could move."""
        return []

    def embedders(self, main: nn.Module) -> tuple[str, ...]:
        """None that could move."""
        return ()


def pooled(encoder: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Mean and maximum of the last hidden states of each text's own tokens, [B, 2 D]."""
    import torch

    reader = cast(Any, encoder)
    length = min(tokenizer.model_max_length, LENGTH)
    found = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
    ids, mask = found["input_ids"].to(reader.device), found["attention_mask"].to(reader.device)
    states = reader(input_ids=ids, attention_mask=mask).last_hidden_state
    own = mask[..., None].bool()
    mean = states.masked_fill(~own, 0).sum(1) / own.sum(1).clamp(min=1)
    most = states.masked_fill(~own, torch.finfo(states.dtype).min).amax(1)
    return torch.cat([mean, most], 1)
