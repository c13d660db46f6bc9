"""Reading PEFT's LoRA files, which are what gtl publishes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtl.adapters.formats import (
    MAGNITUDE,
    MAIN_PARTS,
    PEFT_CONFIG,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    LoraExport,
    LoraWeights,
    split_name,
)
from gtl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

PEFT_DEFAULTS: dict[str, Any] = {
    "r": 8, "lora_alpha": 8, "alpha_pattern": {}, "use_rslora": False, "use_dora": False, "lora_dropout": 0.0,
}  # fmt: skip
REFUSED = {"bias": "none", "modules_to_save": None, "target_parameters": None, "layer_replication": None,
           "trainable_token_indices": None, "use_qalora": False, "alora_invocation_tokens": None}  # fmt: skip
"""PEFT settings that change the model beyond a LoRA's update, with the value that does not."""
MOVED_BASE = ("pissa", "olora", "corda", "loftq")
"""How initialisations begin that change the base weight; PEFT repeats that change when it loads the adapter."""


def read_peft(folder: Path, main: str | None) -> LoraWeights:
    """Read PEFT files of any number of parts, as `write_lora` lays them out; `main` is the part at the root.

    Raises:
        UserError: a file is missing, damaged, or asks for more than LoRA, DoRA and rsLoRA.
    """
    tensors: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    alphas: dict[str, float] = {}
    config: dict[str, Any] = {}
    below = (file for file in folder.glob(f"*/{PEFT_CONFIG}") if is_part(file.parent.name))
    for file in sorted([*folder.glob(PEFT_CONFIG), *below], key=lambda f: len(f.parts)):
        values = _read_peft_config(file)
        config = config or values
        part = main if file.parent == folder else file.parent.name
        if part is None:
            raise UserError(f"{file}: for a part that is not given; it would be one of {', '.join(MAIN_PARTS)}")
        stored, _ = read_safetensors(file.with_name(PEFT_WEIGHTS))
        for key, tensor in stored.items():
            name = f"{part}.{key.removeprefix(PEFT_PREFIX)}"
            name = f"{name}.weight" if name.endswith(MAGNITUDE.removesuffix(".weight")) else name
            tensors[name], keys[name] = tensor, key
            try:
                module = split_name(name)[0].partition(".")[2]
            except UserError:
                raise UserError(f"{file.with_name(PEFT_WEIGHTS)}: {key}: not a LoRA key") from None
            alphas[f"{part}.{module}"] = _pattern(values["alpha_pattern"], module, values["lora_alpha"])
    if not config:
        raise UserError(f"{folder}: no {PEFT_CONFIG} in it")
    if config["use_dora"] != any(name.endswith(MAGNITUDE) for name in tensors):
        raise UserError(f"{folder}: use_dora is {config['use_dora']} in {PEFT_CONFIG}; the weights say otherwise")
    export = LoraExport(
        rank=config["r"], alpha=config["lora_alpha"], rslora=config["use_rslora"], dora=config["use_dora"],
        dropout=config["lora_dropout"], alphas={k: v for k, v in alphas.items() if v != config["lora_alpha"]},
    )  # fmt: skip
    return LoraWeights(tensors, export, keys)


def is_part(name: str) -> bool:
    """Whether a subfolder is a part's; a trainer leaves its checkpoints beside them."""
    return name in MAIN_PARTS or name.startswith("text_encoder")


def _read_peft_config(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        kind = values.get("peft_type") if isinstance(values, dict) else None
        raise UserError(f"{file}: peft_type is {kind!r}; only LORA can be used")
    for key, harmless in REFUSED.items():
        if values.get(key) not in (harmless, None, [], {}):
            raise UserError(f"{file}: {key} is {values[key]!r}, which is not supported; expected {harmless!r}")
    if str(values.get("init_lora_weights")).startswith(MOVED_BASE):
        raise UserError(
            f"{file}: init_lora_weights is {values['init_lora_weights']!r}: its weights are for another base; "
            "save it again with PEFT's path_initial_model_for_weight_conversion"
        )
    found = {key: values[key] if values.get(key) is not None else default for key, default in PEFT_DEFAULTS.items()}
    for key, default in PEFT_DEFAULTS.items():
        kinds = (int, float) if type(default) in (int, float) else type(default)
        if not isinstance(found[key], kinds):
            raise UserError(f"{file}: {key}: {found[key]!r}: expected a {type(default).__name__}")
    for pattern, alpha in found["alpha_pattern"].items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{file}: alpha_pattern: {pattern!r}: not a regular expression ({error})") from error
        if not isinstance(alpha, (int, float)):
            raise UserError(f"{file}: alpha_pattern: {pattern!r}: {alpha!r}: expected a number")
    return found


def _pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the name at a dot."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), default)


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the header's metadata.

    Raises:
        UserError: the file is missing, cut off or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{file}: missing; expected a safetensors file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error})") from error
