"""An adapter merged into the weights it is for, as if they had been trained themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gtl.adapters.apply import apply, moved

if TYPE_CHECKING:
    from torch import nn


def merge(parts: Mapping[str, nn.Module], folder: Path, scale: float = 1.0) -> set[str]:
    """Put an artefact into a model's weights, in place; the names `<part>.<parameter>` of those that changed.

    The parts are plain modules before and after. What changes becomes fp32, and so loses nothing. See `apply`.

    Raises:
        UserError: the artefact does not fit; the model stays as it was.
    """
    changed = moved(parts, folder)
    for name in changed:
        owner, _, own = name.partition(".")
        parameter = parts[owner].get_parameter(own)
        parameter.data = parameter.data.float()
    apply(parts, folder, scale=scale)
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
