"""Which layer of a model a LoRA's tensors belong to, and whether they fit it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gtl.adapters.formats import MAGNITUDE, A, B, LoraWeights, layers_of
from gtl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


def match(weights: LoraWeights, parts: Mapping[str, nn.Module], where: Path) -> LoraWeights:
    """The LoRA under the names that the model's own modules have, in the shapes its layers take.

    A module may be named as the model does, with or without a leading `text_model.` (which depends on the version of
    transformers), or flattened, with `_` for every dot.

    Raises:
        UserError: a key matches no layer (the first is named, with the count), or does not fit its layer.
    """
    indexes = {part: _index(module) for part, module in parts.items()}
    tensors: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    alphas: dict[str, float] = {}
    lost: list[str] = []
    for layer, group in layers_of(weights.tensors, where).items():
        part, _, module = layer.partition(".")
        name = next((n for n in _spellings(module) if n in indexes.get(part, {})), None)
        given = {suffix: weights.keys.get(f"{layer}.{suffix}", f"{layer}.{suffix}") for suffix in group}
        if name is None:
            lost += given.values()
            continue
        full, target = indexes[part][name]
        if f"{part}.{full}.{A}" in tensors:
            raise UserError(f"{where}: {given[A]} and {keys[f'{part}.{full}.{A}']} are both for {part}.{full}")
        for suffix, tensor in group.items():
            new = f"{part}.{full}.{suffix}"
            keys[new] = given[suffix]
            tensors[new] = _shaped(tensor, suffix, int(group[A].shape[0]), target, f"{where}: {given[suffix]}")
        if layer in weights.config.alphas:
            alphas[f"{part}.{full}"] = weights.config.alphas[layer]
    if lost:
        known, total = ", ".join(parts), len(weights.tensors)
        raise UserError(f"{where}: {len(lost)} of {total} keys match no layer of the model's {known}; first: {lost[0]}")
    return LoraWeights(tensors, replace(weights.config, alphas=alphas), keys)


def _index(part: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Layers that can carry a LoRA, by name and by flattened name."""
    layers = {name: base for name, module in part.named_modules() if (base := _layer(name, module)) is not None}
    flat: dict[str, tuple[str, nn.Module]] = {name.replace(".", "_"): (name, base) for name, base in layers.items()}
    return {**flat, **{name: (name, base) for name, base in layers.items()}}


def _layer(name: str, module: nn.Module) -> nn.Module | None:
    from torch import nn

    # The inside of a layer that another adapter has wrapped is not a layer of the model.
    if ".base_layer" in name or ".lora_" in name:
        return None
    base = getattr(module, "base_layer", module)
    return base if isinstance(base, (nn.Linear, nn.Conv2d)) else None


def _spellings(module: str) -> Iterator[str]:
    yield module
    for prefix in ("text_model.", "text_model_"):
        yield module.removeprefix(prefix) if module.startswith(prefix) else f"{prefix}{module}"


def _shaped(tensor: Tensor, suffix: str, rank: int, layer: nn.Module, where: str) -> Tensor:
    from torch import nn

    conv = isinstance(layer, nn.Conv2d)
    if isinstance(layer, nn.Conv2d):
        given, out = (layer.in_channels, *layer.kernel_size), layer.out_channels
    else:
        assert isinstance(layer, nn.Linear)
        given, out = (layer.in_features,), layer.out_features
    shapes: dict[str, tuple[int, ...]] = {
        A: (rank, *given),
        B: (out, rank, 1, 1) if conv else (out, rank),
        MAGNITUDE: (1, out, 1, 1) if conv else (out,),
    }
    expected = shapes[suffix]
    # Only 1s differ: a linear layer stored as a 1x1 convolution, a magnitude stored as a column.
    same = [n for n in tensor.shape if n != 1] == [n for n in expected if n != 1]
    if not same:
        raise UserError(f"{where}: shape {list(tensor.shape)} does not fit the layer, which takes {list(expected)}")
    return tensor.reshape(expected)
