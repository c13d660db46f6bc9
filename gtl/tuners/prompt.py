"""A new word of the text encoders moves, and nothing else: textual inversion (Gal et al. 2022, arXiv 2208.01618)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtl.adapters.apply import WORDY, kind_of
from gtl.adapters.words import Word, fitting_word, write_word
from gtl.config.tuners import LoraTuner, PromptTuner
from gtl.families.word_table import add_word, table_of
from gtl.families.words import check_new
from gtl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gtl.families.base import DiffusionFamily


class Prompt:
    """One word, of as many vectors in every text encoder, in front of a model that stays as it is, or not."""

    def __init__(self, config: PromptTuner | LoraTuner, family: DiffusionFamily) -> None:
        """Nothing is loaded yet. Of a LoRA's settings it is the word's.

        Raises:
            UserError: the model's text encoders cannot learn words.
        """
        self.token = str(config.token)
        if not family.learns_words:
            key = "tuner.type: prompt" if isinstance(config, PromptTuner) else f"tuner.token: {config.token!r}"
            raise UserError(
                f"{key}: {family.name}: its text encoders cannot learn words; models can whose encoders "
                "are all CLIP's, such as sd and sdxl"
            )
        self.config = config
        self.family = family

    def apply(self, parts: dict[str, nn.Module], seed: int, init: Path | None = None) -> dict[str, nn.Parameter]:
        """Freeze everything, and let the encoders know the word by fp32 vectors; the seed decides nothing.

        Raises:
            UserError: the model knows the word, the initializer is longer than the word, or `init` is another word.
        """
        for module in parts.values():
            module.requires_grad_(False)
        return self.add(parts, init)

    def add(self, parts: Mapping[str, nn.Module], init: Path | None) -> dict[str, nn.Parameter]:
        """`apply` to parts that are frozen already, or stay as they are."""
        import torch

        for tokenizer in self.family.tokenizers.values():
            try:
                check_new(tokenizer, self.token)
            except UserError as error:
                raise UserError(f"tuner.token: {error}") from None
        starts = self._initial(parts) if init is None else self._continued(parts, init)
        trainable: dict[str, nn.Parameter] = {}
        for part, start in starts.items():
            name = add_word(parts[part], self.token, start.detach().to(torch.float32, copy=True))
            trainable[f"{part}.{name}"] = vectors = parts[part].get_parameter(name)
            vectors.requires_grad_(True)
        return trainable

    def export(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write the word as diffusers reads it."""
        write_word(Word(self.token, {name.partition(".")[0]: value for name, value in tensors.items()}), folder)

    def _initial(self, parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Vectors [vectors, D] of the initializer, for each encoder."""
        return {part: self._rows(tokenizer, parts[part]) for part, tokenizer in self.family.tokenizers.items()}

    def _rows(self, tokenizer: Any, encoder: nn.Module) -> Tensor:
        config = self.config
        ids = tokenizer(config.initializer, add_special_tokens=False)["input_ids"]
        if not 0 < len(ids) <= config.vectors:
            raise UserError(
                f"tuner.initializer: {config.initializer!r}: is {len(ids)} tokens to this model, and tuner.vectors is "
                f"{config.vectors}; take as many vectors, or fewer words"
            )
        return table_of(encoder).weight[[ids[number % len(ids)] for number in range(config.vectors)]]

    def _continued(self, parts: Mapping[str, nn.Module], init: Path) -> dict[str, Tensor]:
        """Vectors of a published word.

        Raises:
            UserError: it is another, or of another number of vectors.
        """
        config, where = self.config, f"tuner.init: {self.config.init}"
        if (kind := kind_of(init)) not in WORDY:
            raise UserError(f"{where}: it is a {kind}; prompt continues from a prompt")
        try:
            word = fitting_word(parts, init)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        for vectors in word.vectors.values():
            if (word.token, len(vectors)) != (self.token, config.vectors):
                raise UserError(
                    f"{where}: it is {word.token!r} of {len(vectors)} vectors; tuner.token is {config.token!r}, and "
                    f"tuner.vectors {config.vectors}"
                )
        return word.vectors
