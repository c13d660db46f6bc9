"""Deltas: the new values of base weights that moved, in one file, `delta.safetensors`.

Names in the file are `<part>.<parameter>`: a part is a folder of diffusers' layout, a parameter is named as the part's
own module names it. The values are whole weights, not differences: a delta at scale 1 gives exactly what was trained.
Buffers that move in training, such as those of spectral normalisation, are named and read in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from gtl.adapters.formats import write_safetensors
from gtl.adapters.read import read_safetensors
from gtl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

DELTA = "delta.safetensors"
MOVED = "gtl_moved"
"""Attribute of a part: names of its parameters that a delta has set."""


def write_delta(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write new values by `<part>.<parameter>`; equal tensors make equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_safetensors(values, folder / DELTA)


def apply_delta(parts: Mapping[str, nn.Module], folder: Path, name: str, scale: float) -> None:
    """`apply` for a delta: base + scale * (new - base), in the base's dtype and on its device.

    Two deltas add up where they move different weights. Of those that move the same weight the second is refused:
    the first has replaced the base that it would be added to.
    """
    import torch

    found = match_delta(parts, folder)
    for part, parameter, _, _ in found:
        if parameter in getattr(parts[part], MOVED, ()):
            raise UserError(f"{folder}: {part}.{parameter} is moved by another delta already; take one of the two")
    for part, parameter, weight, value in found:
        new = value.to(weight.device, torch.float32)
        with torch.no_grad():
            weight.copy_(torch.lerp(weight.float(), new, scale))  # exactly `new` at scale 1
        parts[part].__dict__.setdefault(MOVED, set()).add(parameter)


def moved_by_delta(parts: Mapping[str, nn.Module], folder: Path) -> set[str]:
    """Names `<part>.<parameter>` of the weights that a delta moves; the parts may be on the meta device."""
    return {f"{part}.{parameter}" for part, parameter, _, _ in match_delta(parts, folder)}


def match_delta(parts: Mapping[str, nn.Module], folder: Path) -> list[tuple[str, str, Tensor, Tensor]]:
    """Part, parameter's name, parameter and new value of everything in the file.

    Raises:
        UserError: the file is damaged, it is for other parts too, or a tensor matches no parameter.
    """
    tensors, _ = read_safetensors(folder / DELTA)
    missing = sorted({name.partition(".")[0] for name in tensors} - set(parts))
    if missing:
        raise UserError(f"{folder}: it is for {', '.join(missing)} too; the parts given are {', '.join(parts)}")
    indexes = {part: own_tensors(module) for part, module in parts.items()}
    found, lost = [], []
    for name, value in tensors.items():
        part, _, parameter = name.partition(".")
        spelling = next((s for s in spellings(parameter) if s in indexes[part]), None)
        if spelling is None:
            lost.append(name)
            continue
        weight = indexes[part][spelling]
        if weight.shape != value.shape:
            raise UserError(f"{folder}: {name} has shape {list(value.shape)}; the model's has {list(weight.shape)}")
        found.append((part, spelling, weight, value))
    if lost:
        known = ", ".join(parts)
        raise UserError(
            f"{folder}: {len(lost)} of {len(tensors)} tensors match no weight of the model's {known}; first: {lost[0]}"
        )
    return found


def own_tensors(part: nn.Module) -> dict[str, Tensor]:
    """A part's own parameters and buffers by the names they have without adapters."""
    tensors = {**dict(part.named_buffers()), **dict(part.named_parameters())}
    return {name.replace(".base_layer", ""): tensor for name, tensor in tensors.items() if ".lora_" not in name}


def tensor_of(part: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of a part without adapters."""
    tensor: Tensor = attrgetter(name)(part)
    return tensor


def spellings(parameter: str) -> list[str]:
    """A parameter's name, and what other versions of transformers call it in a text encoder."""
    prefix = "text_model."
    return [parameter, parameter.removeprefix(prefix) if parameter.startswith(prefix) else prefix + parameter]
