"""LoRAs made by others: diffusers' old and new keys, PEFT, and the layout of kohya's sd-scripts."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtl.adapters.formats import (
    DIFFUSERS_WEIGHTS,
    MAGNITUDE,
    MAIN_PARTS,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    A,
    B,
    LoraExport,
    LoraWeights,
    layers_of,
)
from gtl.adapters.match import match
from gtl.adapters.read import is_part, read_peft, read_safetensors
from gtl.families.sgm import diffusers_keys
from gtl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

ALPHA = "alpha"
LAYERS_PER_BLOCK = 2
"""In Stable Diffusion XL."""
SUFFIXES = {
    ".lora_A.weight": A, ".lora_B.weight": B,
    ".lora_A.default.weight": A, ".lora_B.default.weight": B,
    ".lora_down.weight": A, ".lora_up.weight": B,
    ".lora_linear_layer.down.weight": A, ".lora_linear_layer.up.weight": B,
    ".lora.down.weight": A, ".lora.up.weight": B,
    "_lora.down.weight": A, "_lora.up.weight": B,
    ".lora_magnitude_vector.weight": MAGNITUDE, ".lora_magnitude_vector": MAGNITUDE, ".dora_scale": MAGNITUDE,
    ".alpha": ALPHA,
}  # fmt: skip
"""How the layouts end their keys."""
KOHYA_PARTS = {"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
               "lora_te3_": "text_encoder_3"}  # fmt: skip
OTHER_METHODS = {"hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "a Tucker-decomposed LoCon", "oft_": "OFT",
                 "boft_": "BOFT", "glora_": "GLoRA", "lora_embedding_": "a LoRA of an embedding"}  # fmt: skip
TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def import_lora(path: Path, parts: Mapping[str, nn.Module]) -> LoraWeights:
    """Read somebody's LoRA for a model; `parts` may be on the meta device.

    Raises:
        UserError: the file is missing, damaged or of another method, or one of its keys does not match the model.
    """
    main = next((part for part in parts if part in MAIN_PARTS), None)
    unet: Any = parts.get("unet")
    layers_per_block = LAYERS_PER_BLOCK if unet is None else unet.config.layers_per_block
    weights = match(read_lora(path, main, layers_per_block), parts, path)
    check_values(weights, path)
    return weights


def check_values(weights: LoraWeights, path: Path) -> None:
    """Refuse values that no training leaves.

    Raises:
        UserError: a tensor does not hold real numbers, or one of its numbers is not finite.
    """
    for name, tensor in weights.tensors.items():
        key = weights.keys[name]
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {key}: holds {str(tensor.dtype).removeprefix('torch.')}; expected real numbers")
        if not bool(tensor.float().isfinite().all()):
            raise UserError(f"{path}: {key}: holds values that are not finite; the file is damaged")
    for alpha in (weights.config.alpha, *weights.config.alphas.values()):
        if not math.isfinite(alpha):
            raise UserError(f"{path}: alpha: {alpha}: expected a finite number")


def read_lora(path: Path, main: str | None = "unet", layers_per_block: int = LAYERS_PER_BLOCK) -> LoraWeights:
    """Read a LoRA's file or folder in any layout; `main` is the part that keys without a part's name are for.

    Modules keep the file's spelling (kohya's have `_` for every dot); `match` finds the model's. Only a UNet's blocks
    under the names of Stability's own code are renamed, which takes the `layers_per_block` of its config.

    Raises:
        UserError: the file is missing, damaged or of another method.
    """
    file = _find(path)
    if file.name in (PEFT_CONFIG, PEFT_WEIGHTS) and file.with_name(PEFT_CONFIG).is_file():
        return read_peft(path if path.is_dir() else file.parent, main)
    stored, metadata = read_safetensors(file)
    tensors: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    alphas: dict[str, float] = {}
    for key, name in diffusers_keys(stored, layers_per_block, file).items():
        tensor = stored[key]
        layer, suffix = _read_key(name, main, file, len(stored))
        if suffix == ALPHA:
            if tensor.numel() != 1:
                raise UserError(f"{file}: {key}: expected one number, found shape {list(tensor.shape)}")
            alphas[layer] = float(tensor.item())
        elif key.endswith(".dora_scale") and tensor.shape[:1] != (tensor.numel(),):
            raise UserError(f"{file}: {key}: a DoRA with a magnitude per input; only one per output can be imported")
        else:
            tensors[f"{layer}.{suffix}"], keys[f"{layer}.{suffix}"] = tensor, key
    layers = layers_of(tensors, file)
    if stray := sorted(set(alphas) - set(layers)):
        raise UserError(f"{file}: {len(stray)} alphas have no weights beside them; first: {stray[0]}")
    ranks = {layer: int(group[A].shape[0]) for layer, group in layers.items()}
    dora = any(MAGNITUDE in group for group in layers.values())
    alphas = {**_header_alphas(metadata, ranks, file), **alphas}
    return LoraWeights(tensors, _config(ranks, {layer: alphas.get(layer, r) for layer, r in ranks.items()}, dora), keys)


def _find(path: Path) -> Path:
    if path.is_dir():
        for name in (PEFT_CONFIG, DIFFUSERS_WEIGHTS):
            if (path / name).is_file():
                return path / name
        if below := sorted(file for file in path.glob(f"*/{PEFT_CONFIG}") if is_part(file.parent.name)):
            return below[0]
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise UserError(f"{path}: {len(files)} safetensors files in it; name the file of the LoRA")
        return files[0]
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a LoRA's safetensors file or folder")
    if path.suffix != ".safetensors" and path.name != PEFT_CONFIG:
        raise UserError(f"{path}: only safetensors files are read, found {path.suffix or 'a file without an ending'}")
    return path


def _read_key(key: str, main: str | None, file: Path, total: int) -> tuple[str, str]:
    """A key as (`<part>.<module>`, canonical suffix or `alpha`)."""
    for mark, method in OTHER_METHODS.items():
        if f".{mark}" in key:
            raise UserError(f"{file}: {key}: this is {method}; only LoRA and DoRA can be imported")
    ending = next((end for end in SUFFIXES if key.endswith(end)), None)
    if ending is None:
        raise UserError(f"{file}: {key}: not a LoRA key (the first such of {total} keys)")
    stem = key.removesuffix(ending).removeprefix("base_model.model.").replace(".processor.", ".")
    if stem.startswith("lora_unet_"):
        part, module = main, stem.removeprefix("lora_unet_")
    elif prefix := next((p for p in KOHYA_PARTS if stem.startswith(p)), None):
        part, module = KOHYA_PARTS[prefix], stem.removeprefix(prefix)
    elif (first := stem.partition(".")[0]) in MAIN_PARTS or first.startswith("text_encoder"):
        part, module = first, stem.partition(".")[2]
    else:
        part, module = main, stem
    if part is None:
        raise UserError(f"{file}: {key}: the model has none of {', '.join(MAIN_PARTS)}, for which this key is")
    parent, _, last = module.rpartition(".")
    if part.startswith("text_encoder") and parent.endswith("self_attn"):
        module = f"{parent}.{TEXT_PROJECTIONS.get(last, last)}"
    elif last == "to_out":
        module = f"{module}.0"
    return f"{part}.{module}", SUFFIXES[ending]


def _header_alphas(metadata: Mapping[str, str], ranks: Mapping[str, int], file: Path) -> dict[str, float]:
    """Alphas that give each layer the scale which diffusers reads from the file's header, where it has one."""
    if "lora_adapter_metadata" not in metadata:
        return {}
    try:
        values: dict[str, Any] = json.loads(metadata["lora_adapter_metadata"])
    except ValueError as error:
        raise UserError(f"{file}: lora_adapter_metadata in its header is not JSON ({error})") from error
    alphas = {}
    try:
        for layer, rank in ranks.items():
            part, _, module = layer.partition(".")
            if f"{part}.lora_alpha" in values:
                own = values.get(f"{part}.alpha_pattern") or {}
                alpha = float(own.get(module, own.get(f"^{module}", values[f"{part}.lora_alpha"])))
                alphas[layer] = alpha * math.sqrt(rank) if values.get(f"{part}.use_rslora") else alpha
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{file}: lora_adapter_metadata in its header is not that of diffusers ({error})") from error
    return alphas


def _config(ranks: Mapping[str, int], alphas: Mapping[str, float], dora: bool) -> LoraExport:
    """The commonest rank and alpha, and the layers whose alpha is another."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return LoraExport(rank, alpha, dora=dora, alphas={layer: a for layer, a in alphas.items() if a != alpha})
