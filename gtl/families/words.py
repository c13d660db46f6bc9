"""How prompts with learned words are read (textual inversion, Gal et al. 2022, arXiv 2208.01618).

A word is one or several vectors, each of which is a token. The encoders carry the vectors, see
`gtl.families.word_table`, and a family learns from them what words there are, see `DiffusionFamily.reading`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gtl.types import UserError


def tokens_of(word: str, num_vectors: int) -> list[str]:
    """What a tokenizer reads of a word, one token a vector; named as diffusers does."""
    return [word, *(f"{word}_{number}" for number in range(1, num_vectors))]


def spell_out(prompts: Sequence[str], words: Mapping[str, int]) -> list[str]:
    """Prompts with every word as the tokens of its vectors, in order."""
    if not words:
        return list(prompts)
    found = re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)))
    return [found.sub(lambda match: " ".join(tokens_of(match[0], words[match[0]])), prompt) for prompt in prompts]


def teach(tokenizer: Any, words: Mapping[str, int]) -> Any:
    """A copy of a tokenizer that knows these words, of so many vectors each.

    Raises:
        UserError: it knows one already.
    """
    taught = copy.deepcopy(tokenizer)
    for word, num_vectors in words.items():
        check_new(tokenizer, word)
        taught.add_tokens(tokens_of(word, num_vectors))
    return taught


def check_new(tokenizer: Any, word: str) -> None:
    """Refuse a word that a tokenizer knows.

    Raises:
        UserError: it does.
    """
    if len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1:
        raise UserError(f"{word!r}: is a token of the model's own; take a word that it does not know, such as <{word}>")
