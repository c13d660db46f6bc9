"""The model under an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gtl.types import UserError

if TYPE_CHECKING:
    from torch import nn

    from gtl.adapters.card import Card
    from gtl.families.base import Family


def open_base(card: Card, weights: bool = True) -> Family:
    """The model that a published adapter was made for; without its weights only configs are read, and nothing compared.

    Raises:
        UserError: it is not there, or is another now.
    """
    from gtl.families import open_family

    base = card.base
    family = open_family(base.source, revision=base.revision, variant=base.variant, weights=weights)
    if weights and (found := family.fingerprint()) != base.fingerprint:
        raise UserError(
            f"adapter {card.name}@{card.version}: was made for {base.source} ({base.fingerprint[:12]}); the model "
            f"there is another now ({found[:12]})"
        )
    return family


def model_parts(family: Family) -> list[str]:
    """The parts of a model that have weights an adapter may move, the main one first."""
    codec = [family.codec] if family.codec else []
    return list(dict.fromkeys([family.main, *family.encoders, *codec, *family.critics, *family.heads]))


def empty_parts(family: Family) -> dict[str, nn.Module]:
    """Those parts on the meta device: their names and shapes, without memory."""
    import torch

    with torch.device("meta"):
        return {part: family.build(part) for part in model_parts(family)}
