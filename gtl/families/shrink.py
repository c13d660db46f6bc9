"""Smaller models out of larger ones: fewer layers, with the weights of those that stay (arXiv 2305.15798)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gtl.families import open_family
from gtl.types import UserError

LIST = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions)\.(\d+)(?=\.)")
"""A layer of a UNet's section, in the name of a weight."""


def shrink(
    source: str, out: Path, *, layers: int | None = None, drop_middle: bool = False, revision: str | None = None,
    variant: str | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Write a model whose UNet has fewer layers, and everything else as it was; its number of weights, and before.

    Args:
        source: A hub id, a local folder in diffusers layout, or a bucket URL of one.
        out: Where to, a new folder.
        layers: ResNets, each with its attention, of every section on the way down; on the way up there is one more. The
            first ones stay, and on the way up the last, which alone fits what comes from outside the section.
        drop_middle: Leave the middle section out.
        revision: Branch, tag or commit of a hub id.
        variant: Weight-file variant, for example fp16.

    Raises:
        UserError: the model has no UNet or not so many layers, nothing is left out, or the folder is not new.
    """
    import torch
    from torch import nn

    family = open_family(source, revision=revision, variant=variant)
    if family.main != "unet":
        raise UserError(f"{source}: {family.name} has no UNet; give train a smaller model of its kind as model.source")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: is not empty; give a new folder")
    large: Any = family.load(family.main)
    config = smaller(dict(large.config), layers, drop_middle)
    with torch.random.fork_rng(devices=[]):
        small: Any = nn.Module.to(type(large).from_config(config), large.dtype)  # its own `to` warns of half precision
    tensors = large.state_dict()
    last = {key: tuple(len(section.resnets) - 1 for section in model.up_blocks)
            for key, model in (("small", small), ("large", large))}  # fmt: skip
    small.load_state_dict({
        name: tensors[origin(name, last["small"], last["large"])] for name in small.state_dict()
    })  # fmt: skip
    family.export({family.main: small}, out)
    return small.num_parameters(), large.num_parameters()


def smaller(config: dict[str, Any], layers: int | None, drop_middle: bool) -> dict[str, Any]:
    """The config of a UNet with fewer layers.

    Raises:
        UserError: it has not so many, or nothing is left out.
    """
    now = config["layers_per_block"]
    most = now if isinstance(now, int) else max(now)
    if layers is not None and not 1 <= layers <= most:
        raise UserError(f"--layers: {layers}: expected 1 to {most}, which the model has")
    has_middle = config.get("mid_block_type") is not None
    if not ((layers is not None and layers < most) or (drop_middle and has_middle)):
        raise UserError("--layers: nothing is left out; give fewer than the model has, or --drop-middle if it has one")
    if layers is not None:
        config["layers_per_block"] = layers if isinstance(now, int) else [min(layers, each) for each in now]
    if drop_middle:
        config["mid_block_type"] = None
    return config


def origin(name: str, last: tuple[int, ...], last_before: tuple[int, ...]) -> str:
    """The name of a weight in the larger UNet; the last layers on the way up stay the last."""
    found = LIST.match(name)
    if found is None or found[1] == "down_blocks" or int(found[4]) < last[int(found[2])]:
        return name
    return f"{found[1]}.{found[2]}.{found[3]}.{last_before[int(found[2])]}{name[found.end() :]}"
