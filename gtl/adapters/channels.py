"""Weights of the channels that an adapter adds to the model's input, in a file beside what else it moves.

Names in it are `<part>.<layer>.added`; a model that was published without them has zeros there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gtl.adapters.formats import write_safetensors
from gtl.adapters.read import read_safetensors
from gtl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

CHANNELS = "input_channels.safetensors"
SUFFIX = ".added"
EDITS = "it was taught to edit an image that it is shown, through further channels of the model's input"


def adds_channels(folder: Path) -> bool:
    """Whether an artefact has any."""
    return (folder / CHANNELS).is_file()


def split_channels(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a tuner trained: the weights of added channels, and all else."""
    added = {name: tensor for name, tensor in tensors.items() if name.endswith(SUFFIX)}
    return added, {name: tensor for name, tensor in tensors.items() if name not in added}


def write_channels(added: Mapping[str, Tensor], folder: Path) -> None:
    """Write them, where there are any."""
    if added:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors({name: value.detach().cpu().contiguous() for name, value in added.items()}, folder / CHANNELS)


def wide_in(parts: Mapping[str, nn.Module]) -> set[str]:
    """Names `<part>.<layer>` of what reads further channels already."""
    from gtl.families.wide import wide_layers

    return {f"{part}.{layer}" for part, module in parts.items() for layer, _ in wide_layers(module)}


def match_channels(parts: Mapping[str, nn.Module], folder: Path) -> list[tuple[str, str, Tensor]]:
    """Part, layer and weights [out, more, k, k] of all that an artefact adds; [] where it adds none.

    Raises:
        UserError: the file is damaged, or what it holds fits no layer.
    """
    if not adds_channels(folder):
        return []
    from gtl.families.wide import check_widens

    tensors, _ = read_safetensors(folder / CHANNELS)
    found = []
    for name, value in tensors.items():
        part, _, layer = name.removesuffix(SUFFIX).partition(".")
        try:
            weight = check_widens(layer, parts[part].get_submodule(layer)).weight
        except (KeyError, AttributeError):
            raise UserError(f"{folder / CHANNELS}: {name}: the model has no such layer") from None
        shape = list(weight.shape)
        if value.dim() != 4 or [value.shape[0], *value.shape[2:]] != [shape[0], *shape[2:]]:
            raise UserError(f"{folder / CHANNELS}: {name} has shape {list(value.shape)}; the model's layer has {shape}")
        found.append((part, layer, value))
    return found


def add_channels(parts: Mapping[str, nn.Module], found: list[tuple[str, str, Tensor]], scale: float) -> None:
    """Let the layers read further channels, and add what was matched, times a scale, to their weights for them."""
    import torch

    from gtl.families.wide import widen

    for part, layer, value in found:
        wide = widen(parts[part], layer, value.shape[1])
        with torch.no_grad():
            wide.added.add_(value.to(wide.added.device, wide.added.dtype), alpha=scale)
