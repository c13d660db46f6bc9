"""The order of a diffusers UNet with cross attention: `UNet2DConditionModel`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

HEAD = ("conv_norm_out", "conv_out")
"""Behind the blocks."""


def unet_blocks(unet: nn.Module) -> list[tuple[str, ...]]:
    """Every ResNet and every transformer block, or attention alone, in execution order, see `Family.blocks`."""
    blocks: list[list[str]] = []
    for name in unet_sections(unet):
        section = unet.get_submodule(name)
        resnets = _children(section, name, "resnets")
        attentions = _children(section, name, "attentions")
        # In down and up sections an attention follows its ResNet; in the middle a ResNet more comes last.
        for resnet, attention in zip_longest(resnets, attentions):
            blocks.append([resnet])
            if attention is None:
                continue
            layers = unet.get_submodule(attention)
            if not hasattr(layers, "transformer_blocks"):  # DeepFloyd IF's attend to the image and the text at once
                blocks.append([attention])
                continue
            blocks[-1] += [f"{attention}.{child}" for child in ("norm", "proj_in") if _has_weights(layers, child)]
            blocks += [[block] for block in _children(layers, attention, "transformer_blocks")]
            blocks[-1].append(f"{attention}.proj_out")
        for sampler in (*_children(section, name, "downsamplers"), *_children(section, name, "upsamplers")):
            if hasattr(unet.get_submodule(sampler), "conv1"):  # a ResNet too, in DeepFloyd IF
                blocks.append([sampler])
            else:
                blocks[-1].append(sampler)
    return [tuple(block) for block in blocks]


def unet_embedders(unet: nn.Module) -> tuple[str, ...]:
    """What runs before the first block."""
    sections = {name.partition(".")[0] for name in unet_sections(unet)}
    return tuple(
        name
        for name, child in unet.named_children()
        if name not in sections and name not in HEAD and next(child.parameters(), None) is not None
    )


def unet_cross_attentions(unet: nn.Module) -> tuple[str, ...]:
    """The attention modules that read the condition."""
    return tuple(name for name, module in unet.named_modules() if getattr(module, "is_cross_attention", False))


def unet_sections(unet: nn.Module) -> Iterator[str]:
    """Down, middle and up, in execution order."""
    yield from _children(unet, "", "down_blocks")
    if getattr(unet, "mid_block", None) is not None:
        yield "mid_block"
    yield from _children(unet, "", "up_blocks")


def _children(parent: nn.Module, name: str, child: str) -> list[str]:
    members = getattr(parent, child, None)
    return [f"{name}.{child}.{i}".lstrip(".") for i in range(len(members))] if members is not None else []


def _has_weights(parent: nn.Module, child: str) -> bool:
    module = getattr(parent, child, None)
    return module is not None and next(module.parameters(), None) is not None
