"""LoRA files as gtl publishes them: PEFT's and diffusers'.

Canonical names: `<part>.<module>.lora_A.weight` [r, in, ...], `<part>.<module>.lora_B.weight` [out, r, ...] and, in a
DoRA, `<part>.<module>.lora_magnitude_vector.weight`. A part is a folder of diffusers' layout: unet, text_encoder, ...
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gtl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_PREFIX = "base_model.model."
MAIN_PARTS = ("unet", "transformer")
"""Parts whose PEFT files lie at the root of the folder; any other part's are in a subfolder of its name."""
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"


@dataclass(frozen=True)
class LoraExport:
    """How LoRA tensors enter the model: the update of a layer is `scale * B A`.

    The rank of a layer is its A's; the scale is alpha / rank, or alpha / sqrt(rank) with `rslora`.
    """

    rank: int
    """Written as the config's `r`; layers of another rank are written beside it."""
    alpha: float
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    alphas: Mapping[str, float] = field(default_factory=dict)
    """`<part>.<module>` -> alpha, of layers that have their own."""

    def scale(self, layer: str, rank: int) -> float:
        """Factor of B A in a layer `<part>.<module>`."""
        return self.alphas.get(layer, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


class LoraWeights(NamedTuple):
    """A LoRA that was read, with what is needed to use it."""

    tensors: dict[str, Tensor]
    """By canonical name."""
    config: LoraExport
    keys: dict[str, str]
    """Canonical name -> key in the file, for messages."""


def split_name(name: str) -> tuple[str, str]:
    """A canonical tensor name as (`<part>.<module>`, `lora_A.weight` | `lora_B.weight` | the magnitude's).

    Raises:
        UserError: it is none.
    """
    for suffix in (A, B, MAGNITUDE):
        layer = name.removesuffix(f".{suffix}")
        if layer != name and "." in layer:
            return layer, suffix
    raise UserError(f"{name}: not a LoRA tensor; expected <part>.<module>.{A}, .{B} or .{MAGNITUDE}")


def layers_of(tensors: Mapping[str, Tensor], where: str | Path = "adapter") -> dict[str, dict[str, Tensor]]:
    """Tensors grouped by layer `<part>.<module>` and suffix, sorted by layer.

    Raises:
        UserError: there is none, a name is not canonical, or a layer lacks A, B or, in a DoRA, its magnitude.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name in sorted(tensors):
        layer, suffix = split_name(name)
        layers.setdefault(layer, {})[suffix] = tensors[name]
    needed = [A, B, MAGNITUDE] if any(MAGNITUDE in group for group in layers.values()) else [A, B]
    if not layers:
        raise UserError(f"{where}: holds no LoRA tensors")
    for layer, group in layers.items():
        for suffix in needed:
            if suffix not in group:
                raise UserError(f"{where}: {layer}.{suffix} is missing; a layer needs {' and '.join(needed)}")
        if group[A].dim() < 2 or 0 in group[A].shape:
            raise UserError(f"{where}: {layer}.{A} has shape {list(group[A].shape)}; expected [rank, inputs]")
    return layers


def write_lora(tensors: Mapping[str, Tensor], folder: Path, *, config: LoraExport) -> None:
    """Write canonical tensors as PEFT files (each part apart) and as one diffusers file.

    The diffusers file has the scale folded into B, because readers ignore an alpha that is not in the file.

    Raises:
        UserError: a name is not canonical, or a layer is incomplete.
    """
    layers = layers_of(tensors)
    if config.dora != any(MAGNITUDE in group for group in layers.values()):
        raise ValueError(f"config.dora is {config.dora}, the tensors say otherwise")
    folder.mkdir(parents=True, exist_ok=True)
    for part in sorted({layer.partition(".")[0] for layer in layers}):
        _write_peft(part, layers, folder if part in MAIN_PARTS else folder / part, config)
    _write_diffusers(layers, folder, config)


def peft_config(part: str, ranks: Mapping[str, int], config: LoraExport) -> dict[str, Any]:
    """Arguments of `peft.LoraConfig` for the layers `<part>.<module>` -> rank of one part, with exact module names."""
    own = {layer: rank for layer, rank in ranks.items() if layer.startswith(f"{part}.")}
    rank = config.rank if config.rank in own.values() else Counter(own.values()).most_common(1)[0][0]

    def pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
        # "^" anchors PEFT's pattern: without it a name also matches where it ends a longer one.
        return {f"^{layer.partition('.')[2]}": plain(v) for layer, v in values.items() if v != default}

    alphas = {layer: config.alphas[layer] for layer in own if layer in config.alphas}
    return {
        "r": rank,
        "lora_alpha": plain(config.alpha),
        "rank_pattern": pattern(own, rank),
        "alpha_pattern": pattern(alphas, config.alpha),
        "target_modules": sorted(layer.partition(".")[2] for layer in own),
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "inference_mode": True,
    }


def plain(value: float) -> float:
    """The number, as an int where it is whole: PEFT declares alpha an int."""
    return int(value) if float(value).is_integer() else value


def _write_peft(part: str, layers: Mapping[str, Mapping[str, Tensor]], folder: Path, config: LoraExport) -> None:
    from peft import LoraConfig

    own = {layer: group for layer, group in layers.items() if layer.startswith(f"{part}.")}
    ranks = {layer: int(group[A].shape[0]) for layer, group in own.items()}
    values = LoraConfig(**peft_config(part, ranks, config)).to_dict()
    values["target_modules"] = sorted(values["target_modules"])  # a set inside LoraConfig
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PEFT_CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    named = {
        f"{PEFT_PREFIX}{stored_name(layer.partition('.')[2], suffix)}": tensor.detach().cpu().contiguous()
        for layer, group in own.items()
        for suffix, tensor in group.items()
    }
    write_safetensors(named, folder / PEFT_WEIGHTS)


def _write_diffusers(layers: Mapping[str, Mapping[str, Tensor]], folder: Path, config: LoraExport) -> None:
    import torch

    scales = {layer: config.scale(layer, int(group[A].shape[0])) for layer, group in layers.items()}
    dtypes = {tensor.dtype for group in layers.values() for tensor in group.values()}
    # diffusers runs tensors in the dtype they are stored in, so a file has one: the given, if folding is only a shift
    # of exponents.
    exact = len(dtypes) == 1 and all(math.frexp(scale)[0] == 0.5 for scale in scales.values())
    dtype = dtypes.pop() if exact else torch.float32
    named = {}
    for layer, group in layers.items():
        for suffix, tensor in group.items():
            value = tensor.detach().cpu().float() * (scales[layer] if suffix == B else 1.0)
            named[stored_name(layer, suffix)] = value.to(dtype).contiguous()
    write_safetensors(named, folder / DIFFUSERS_WEIGHTS)


def write_safetensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a file of tensors, which are contiguous and on the CPU; equal tensors make equal files.

    Raises:
        OSError: the disk is full or the folder cannot be written to; safetensors' own error is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        # One key: safetensors writes several in random order.
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:
        if (code := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(file)) from error


def stored_name(layer: str, suffix: str) -> str:
    """Name of a tensor inside a file; both readers store DoRA's magnitude without `.weight`."""
    return f"{layer}.{suffix.removesuffix('.weight') if suffix == MAGNITUDE else suffix}"
