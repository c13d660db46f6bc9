"""An adapter merged into the weights it is for, as if they had been trained themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gtl.adapters.apply import apply, moved

if TYPE_CHECKING:
    from torch import nn


def merge(parts: Mapping[str, nn.Module], folder: Path, scale: float = 1.0) -> set[str]:
    """`merge_all` of one artefact."""
    return merge_all(parts, ((folder, scale),))


def merge_all(parts: Mapping[str, nn.Module], adapters: Sequence[tuple[Path, float]]) -> set[str]:
    """Put artefacts into a model's weights, in place; the names `<part>.<parameter>` of those that changed.

    They are all on the model before any is folded in, so that a delta replaces the base's weights and not another's
    update of them. The parts are plain modules before and after. What changes becomes fp32, and so loses nothing; it
    gets memory of its own. See `apply`.

    Raises:
        UserError: an artefact does not fit; the model may be changed by those before it.
    """
    changed = {name for folder, _ in adapters for name in moved(parts, folder)}
    for name in changed:
        owner, _, own = name.partition(".")
        parameter = parts[owner].get_parameter(own)
        parameter.data = parameter.data.float().clone()
    for number, (folder, scale) in enumerate(adapters):
        apply(parts, folder, f"adapter{number}", scale)
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
