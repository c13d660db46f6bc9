"""Words in a text encoder: vectors behind its table of tokens (textual inversion, arXiv 2208.01618)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding


class WordTable(nn.Embedding):
    """A table of tokens, with the vectors of learned words at the ids behind its end.

    The table's own weight is the same parameter under the same name as before. What has learned is beside it, as
    `learned_0` [vectors, D] and so on, so that nothing of the table has to move, and no row of it has to be masked.
    An encoder that takes the largest id for the end of a text, as SDXL's second does, takes a word's last one for it;
    it does so in diffusers too.
    """

    def __init__(self, table: nn.Embedding) -> None:
        """No word is known yet."""
        super().__init__(
            table.num_embeddings, table.embedding_dim, table.padding_idx, _weight=table.weight, _freeze=True
        )
        self.weight = table.weight  # itself, and not another parameter in its memory
        self.words: dict[str, int] = {}
        """Word -> number of its vectors, in the order of their ids."""
        self.train(table.training)

    def add(self, word: str, vectors: Tensor) -> str:
        """Put a word's vectors [n, D] behind those that are there; the name of their parameter, which is frozen."""
        if word in self.words:
            raise ValueError(f"{word!r} is known already")
        name = f"learned_{len(self.words)}"
        self.register_parameter(name, nn.Parameter(vectors, requires_grad=False))
        self.words[word] = len(vectors)
        return name

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors [..., D] of ids [...], in the table's dtype."""
        is_known = ids < self.num_embeddings
        known = super().forward(ids.where(is_known, 0))
        learned = torch.cat([self.get_parameter(f"learned_{number}") for number in range(len(self.words))])
        own = embedding((ids - self.num_embeddings).clamp(min=0), learned.to(known.dtype))
        return torch.where(is_known[..., None], known, own)


def table_of(encoder: nn.Module) -> nn.Embedding:
    """Where an encoder looks tokens up."""
    return cast(nn.Embedding, cast(Any, encoder).get_input_embeddings())


def words_of(encoder: nn.Module) -> dict[str, int]:
    """The words that an encoder has learned -> number of their vectors, in the order of their ids."""
    table = table_of(encoder)
    return dict(table.words) if isinstance(table, WordTable) else {}


def add_word(encoder: nn.Module, word: str, vectors: Tensor) -> str:
    """Let an encoder know a word by its vectors [n, D], in place; the name of their parameter within the encoder."""
    table = table_of(encoder)
    if not isinstance(table, WordTable):
        table = WordTable(table)
        cast(Any, encoder).set_input_embeddings(table)
    own = table.add(word, vectors)
    return f"{next(name for name, module in encoder.named_modules() if module is table)}.{own}"


def remove_words(encoder: nn.Module) -> None:
    """Let an encoder forget all words, in place."""
    table = table_of(encoder)
    if isinstance(table, WordTable):
        plain = nn.Embedding(
            table.num_embeddings, table.embedding_dim, table.padding_idx, _weight=table.weight, _freeze=True
        )
        plain.weight = table.weight
        cast(Any, encoder).set_input_embeddings(plain.train(table.training))
