"""Adapters merged into the weights they are for, as if those had been trained themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gtl.adapters.apply import WORDY, apply, apply_lora, kind_of, moved, moved_by_lora
from gtl.adapters.delta import tensor_of
from gtl.types import UserError

if TYPE_CHECKING:
    from torch import nn


def merge(
    parts: Mapping[str, nn.Module], adapters: Sequence[tuple[Path, float]], *, beside_words: bool = False
) -> set[str]:
    """Put artefacts with their scales into a model's weights; the names `<part>.<parameter>` of those that changed.

    They are all on the model before any is folded in, so that a delta replaces the base's weights and not another's
    update of them. The parts are plain modules before and after. What changes becomes fp32, and so loses nothing; it
    gets memory of its own. See `apply`. With `beside_words` the word of one that has one and weights too is left out.

    Raises:
        UserError: an artefact does not fit, or is or has a word, and the model stays as it was; or two deltas move one
            weight, and the model has the first.
    """
    for folder, _ in adapters:
        if (kind := kind_of(folder)) in WORDY and not (beside_words and kind == "pivotal"):
            raise UserError(
                f"{folder}: it {'is' if kind == 'prompt' else 'has'} a word beside the model's weights, and cannot be "
                "merged into them; diffusers reads it by load_textual_inversion"
            )
    pivotal = [kind_of(folder) == "pivotal" for folder, _ in adapters]
    changed: set[str] = set()
    for (folder, _), is_pivotal in zip(adapters, pivotal, strict=True):
        changed |= moved_by_lora(parts, folder) if is_pivotal else moved(parts, folder)
    for name in changed:
        owner, _, own = name.partition(".")
        parameter = tensor_of(parts[owner], own)
        parameter.data = parameter.data.to(torch.float32, copy=True)
    for number, (folder, scale) in enumerate(adapters):
        (apply_lora if pivotal[number] else apply)(parts, folder, f"adapter{number}", scale)
    for part in parts.values():
        fold(part)
    return changed


def fold(part: nn.Module) -> None:
    """Merge LoRA layers into their base layers and take them away."""
    from peft.tuners.lora import LoraLayer

    layers = [(name, layer) for name, layer in part.named_modules() if isinstance(layer, LoraLayer)]
    for name, layer in layers:
        layer.merge()
        part.set_submodule(name, layer.get_base_layer())
    if layers:
        del part.peft_config
