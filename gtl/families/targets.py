"""Which layers a LoRA target set names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from gtl.types import UserError

if TYPE_CHECKING:
    from torch import nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
ENCODER_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
"""In the CLIP encoders of transformers."""
ENCODER_FEED_FORWARD = ("fc1", "fc2")


def find_targets(
    main: nn.Module,
    before: Sequence[str],
    blocks: Sequence[Sequence[str]],
    targets: str | Sequence[str],
) -> list[str]:
    """Names of linear and convolution layers, in execution order: of the blocks, and for a list of endings of all.

    `before` and `blocks` are the module-name prefixes of `Family.embedders` and `Family.blocks`.

    Raises:
        UserError: an ending matches no layer.
    """
    from torch import nn

    layers = {name: module for name, module in main.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    inside = ordered(layers, [prefix for block in blocks for prefix in block])
    if isinstance(targets, str):
        if targets == "all-linear+conv":
            return inside
        if targets == "all-linear":
            return [name for name in inside if isinstance(layers[name], nn.Linear)]
        endings = {"attention": ATTENTION, "attention+ff": (*ATTENTION, *FEED_FORWARD)}[targets]
        return [name for name in inside if has_ending(name, endings)]
    return by_endings(list(dict.fromkeys([*ordered(layers, before), *inside, *layers])), targets)


def find_encoder_targets(encoder: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of a text encoder's linear layers, in execution order; it has no convolutions.

    Raises:
        UserError: an ending matches no layer.
    """
    from torch import nn

    layers = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    if not isinstance(targets, str):
        return by_endings(layers, targets)
    inside = [name for name in layers if ".layers." in f".{name}"]
    if targets in ("all-linear", "all-linear+conv"):
        return inside
    endings = {"attention": ENCODER_ATTENTION, "attention+ff": (*ENCODER_ATTENTION, *ENCODER_FEED_FORWARD)}[targets]
    return [name for name in inside if has_ending(name, endings)]


def by_endings(names: Sequence[str], endings: Sequence[str]) -> list[str]:
    """The names that end so.

    Raises:
        UserError: an ending matches none of them.
    """
    for ending in endings:
        if not any(has_ending(name, [ending]) for name in names):
            close = difflib.get_close_matches(ending, sorted(endings_of(names)), n=3)
            hint = f"close: {', '.join(close)}" if close else f"the first layers are {', '.join(names[:3])}"
            raise UserError(f"tuner.targets: {ending!r}: no linear or convolution layer's name ends so; {hint}")
    return [name for name in names if has_ending(name, endings)]


def ordered(names: Iterable[str], prefixes: Sequence[str]) -> list[str]:
    """The names under the prefixes, in the prefixes' order."""
    return [name for prefix in prefixes for name in names if name == prefix or name.startswith(f"{prefix}.")]


def has_ending(name: str, endings: Sequence[str]) -> bool:
    """Whether a name ends so, at a dot or as a whole."""
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def endings_of(names: Sequence[str]) -> set[str]:
    """All endings of one to three parts, without those that are only numbers."""
    parts = [name.split(".") for name in names]
    endings = {".".join(p[-count:]) for p in parts for count in (1, 2, 3)}
    return {ending for ending in endings if not ending.isdigit()}
