"""Feature extractors that metrics are computed with: one shape for all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gtl.types import UserError

if TYPE_CHECKING:
    from gtl.backbones.base import Backbone

BUILTIN = "builtin:backbone"
INCEPTION = "inception:"


def open_backbone(spec: str) -> Backbone:
    """A feature extractor, with its weights, on the CPU.

    Args:
        spec: `builtin:backbone`, trained on the built-in scenes; `inception:FILE`, the network of FID with the weights
            that pytorch-fid publishes; or a local folder or hub id of a transformers model that sees: CLIP (whose
            backbone is a `TextBackbone`), DINOv2, ViT, ConvNeXt, ...

    Raises:
        UserError: there is no such thing, or its files are not what they have to be.
    """
    if spec.startswith(INCEPTION):
        from gtl.backbones.inception import open_inception

        return open_inception(spec.removeprefix(INCEPTION))
    if spec.startswith("builtin:"):
        find_backbone(spec)
        from gtl.backbones.scenes import builtin_folder, open_scenes

        return open_scenes(builtin_folder())
    from gtl.backbones.pretrained import open_pretrained

    return open_pretrained(spec)


def find_backbone(spec: str) -> None:
    """Refuse what `open_backbone` would not find here, before anything is computed for it; nothing is read.

    Raises:
        UserError: there is no such thing.
    """
    if spec.startswith(INCEPTION):
        from gtl.backbones.inception import find_inception

        find_inception(spec.removeprefix(INCEPTION))
    elif spec.startswith("builtin:"):
        if spec != BUILTIN:
            raise UserError(f"{spec}: no such built-in backbone; there is {BUILTIN}")
    else:
        from gtl.backbones.pretrained import find_pretrained

        find_pretrained(spec)
