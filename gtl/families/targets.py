"""Which layers a LoRA target set names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from gtl.types import UserError

if TYPE_CHECKING:
    from torch import nn

Endings = Mapping[str, tuple[str, ...]]
"""Of the target sets that are known by their layers' names: how these end."""


def _with_attention(attention: tuple[str, ...], feed_forward: tuple[str, ...]) -> Endings:
    return {"attention": attention, "attention+ff": (*attention, *feed_forward)}


CROSS = _with_attention(
    ("to_q", "to_k", "to_v", "to_out.0"),
    # Sana's feed-forward is of convolutions.
    ("ff.net.0.proj", "ff.net.2", "ff.conv_inverted", "ff.conv_point"),
)
"""In transformer blocks that attend to the image, and then to the text."""
ADDED = _with_attention((*CROSS["attention"], "add_k_proj", "add_v_proj"), ())
"""In attentions that have the text's keys and values beside the image's own, with no feed-forward after them."""
JOINT = _with_attention(
    (
        *CROSS["attention"], "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        # FLUX.2's single blocks have one projection into attention and feed-forward, and one out of both.
        "to_qkv_mlp_proj", "attn.to_out",
    ),
    (
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
        # FLUX's single blocks run both at once: the one projection out of them is for attention and feed-forward.
        "proj_mlp", "proj_out",
        *(f"{ff}.linear_{way}" for ff in ("ff", "ff_context") for way in ("in", "out")),
        *(f"feed_forward.w{i}" for i in (1, 2, 3)),
        *(f"{side}_mlp.net.{layer}" for side in ("img", "txt") for layer in ("0.proj", "2")),
    ),
)  # fmt: skip
"""In transformers that attend to image and text jointly."""
ENCODER = _with_attention(
    ("q_proj", "k_proj", "v_proj", "out_proj", "o_proj", *(f"SelfAttention.{name}" for name in "qkvo")),
    (
        "fc1", "fc2", "gate_proj", "up_proj", "down_proj",
        *(f"DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1", "wo")),
    ),
)  # fmt: skip
"""In transformers' CLIP and T5, and in its language models."""
SIGHT = frozenset({"visual", "vision_tower", "multi_modal_projector"})
"""Parts of language models that no prompt reaches."""


def find_targets(
    main: nn.Module,
    before: Sequence[str],
    blocks: Sequence[Sequence[str]],
    targets: str | Sequence[str],
    endings: Endings,
) -> list[str]:
    """Names of linear and convolution layers, in execution order: of the blocks, and for a list of endings of all.

    The sets leave out convolutions by groups of channels: an adapter's rank would have to be a multiple of the groups.

    `before` and `blocks` are the module-name prefixes of `Family.embedders` and `Family.blocks`; `endings` say what
    the family's sets are.

    Raises:
        UserError: an ending matches no layer.
    """
    from torch import nn

    layers = {name: module for name, module in main.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    inside = ordered(layers, [prefix for block in blocks for prefix in block])
    if isinstance(targets, str):
        inside = [name for name in inside if getattr(layers[name], "groups", 1) == 1]
        if targets == "all-linear+conv":
            return inside
        if targets == "all-linear":
            return [name for name in inside if isinstance(layers[name], nn.Linear)]
        return [name for name in inside if has_ending(name, endings[targets])]
    return by_endings(list(dict.fromkeys([*ordered(layers, before), *inside, *layers])), targets)


def find_encoder_targets(encoder: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of a text encoder's linear layers, in execution order; it has no convolutions.

    Raises:
        UserError: an ending matches no layer.
    """
    from torch import nn

    layers = [
        name for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and SIGHT.isdisjoint(name.split("."))
    ]  # fmt: skip
    if not isinstance(targets, str):
        return by_endings(layers, targets)
    inside = [name for name in layers if {"layers", "block"}.intersection(name.split("."))]
    if targets in ("all-linear", "all-linear+conv"):
        return inside
    return [name for name in inside if has_ending(name, ENCODER[targets])]


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
