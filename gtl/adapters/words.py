"""Learned words: their vectors in `learned_embeds.safetensors`, as diffusers' `load_textual_inversion` reads them.

For a model with one text encoder the file has one tensor [vectors, D], whose key is the word. For one with two or more
the keys are clip_l, clip_g and so on, each of which is given to diffusers with the word and with its own encoder.
`learned_word.json` beside it says which word it is, and which key is for which part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gtl.adapters.formats import write_safetensors
from gtl.adapters.read import read_safetensors
from gtl.config.pairs import TEXT_ENCODER
from gtl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

EMBEDS = "learned_embeds.safetensors"
WORD = "learned_word.json"
CLIP_KEYS = ("clip_l", "clip_g")
"""Keys of the first and the second encoder where there are several; what follows is named as the part."""


class Word(NamedTuple):
    """A learned word."""

    token: str
    vectors: dict[str, Tensor]
    """[vectors, D] by part."""


def write_word(word: Word, folder: Path) -> None:
    """Write a word; equal ones make equal files."""
    parts = sorted(word.vectors)
    keys = [word.token] if len(parts) == 1 else [*CLIP_KEYS, *parts[2:]][: len(parts)]
    folder.mkdir(parents=True, exist_ok=True)
    told = {"token": word.token, "keys": dict(zip(parts, keys, strict=True))}
    (folder / WORD).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    values = {key: word.vectors[part].detach().cpu().contiguous() for part, key in zip(parts, keys, strict=True)}
    write_safetensors(values, folder / EMBEDS)


def read_word(folder: Path) -> Word:
    """The word in a folder.

    Raises:
        UserError: a file is missing or damaged, or is of something else.
    """
    tensors, _ = read_safetensors(folder / EMBEDS)
    file = folder / WORD
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        token, keys = str(told["token"]), {str(part): tensors[key] for part, key in told["keys"].items()}
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(f"{file}: does not say which word is in {EMBEDS} ({type(error).__name__}: {error})") from error
    shapes = [list(tensor.shape) for tensor in keys.values()]
    if not shapes or any(len(shape) != 2 for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        raise UserError(f"{folder / EMBEDS}: its tensors have shapes {shapes}; expected [vectors, D], as many for each")
    return Word(token, keys)


def fitting_word(parts: Mapping[str, nn.Module], folder: Path) -> Word:
    """The word in a folder, if it is for exactly the text encoders among a model's parts.

    Raises:
        UserError: it is not, or a file is missing or damaged.
    """
    from gtl.families.word_table import table_of, words_of

    word, encoders = read_word(folder), sorted(part for part in parts if part.startswith(TEXT_ENCODER))
    if sorted(word.vectors) != encoders:
        raise UserError(
            f"{folder}: {word.token!r} is for {', '.join(word.vectors)}; the text encoders given are "
            f"{', '.join(encoders) or 'none'}"
        )
    for part, vectors in word.vectors.items():
        if (width := table_of(parts[part]).embedding_dim) != vectors.shape[1]:
            raise UserError(f"{folder}: {word.token!r} has {vectors.shape[1]} numbers a vector; {part} has {width}")
        if word.token in words_of(parts[part]):
            raise UserError(f"{folder}: {word.token!r} is a word of another adapter already; take one of the two")
    return word


def apply_word(parts: Mapping[str, nn.Module], folder: Path, name: str, scale: float) -> None:
    """`apply` for a word: its encoders know it from now on, and a family reads it from them."""
    from gtl.families.word_table import add_word, table_of

    word = fitting_word(parts, folder)
    if scale != 1:
        raise UserError(f"{folder}: scale {scale:g}: the word {word.token!r} has none; take 1")
    for part, vectors in word.vectors.items():
        weight = table_of(parts[part]).weight
        add_word(parts[part], word.token, vectors.to(weight.device, weight.dtype))


def moved_by_word(parts: Mapping[str, nn.Module], folder: Path) -> set[str]:
    """`moved` for a word: the tables that it is looked up beside, whose own values stay."""
    from gtl.families.word_table import table_of

    return {
        f"{part}.{name}"
        for part in fitting_word(parts, folder).vectors
        for name, parameter in parts[part].named_parameters()
        if parameter is table_of(parts[part]).weight
    }
