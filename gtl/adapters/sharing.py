"""Which adapters can share a forward pass with others, each in a slot."""

from __future__ import annotations

import json
from pathlib import Path

from gtl.adapters.apply import WORDY, kind_of
from gtl.adapters.card import Card
from gtl.adapters.channels import EDITS, adds_channels
from gtl.adapters.formats import PEFT_CONFIG
from gtl.types import UserError

DORA = "it is a DoRA, which rescales whole weights of the base"

WORD = "it is a {}, whose word the base's encoders have to know"


def fits(adapter: Card | Path) -> str | None:
    """Why an adapter, by its card or its folder, cannot share a forward pass with others; None: it can.

    Whether its layers and ranks are those of the slots, `Slots.read` finds.

    Raises:
        UserError: there is no adapter in the folder, or it is damaged.
    """
    if adapter.edits if isinstance(adapter, Card) else adds_channels(adapter):
        return EDITS
    if isinstance(adapter, Card):
        kind, dora = adapter.kind, bool(adapter.tuner.get("dora"))
    else:
        kind = kind_of(adapter)
        dora = any(uses_dora(file) for file in (*adapter.glob(PEFT_CONFIG), *adapter.glob(f"*/{PEFT_CONFIG}")))
    if kind in WORDY:
        return WORD.format(kind)
    if kind != "lora":
        return f"it is a {kind}, which replaces weights of the base"
    return DORA if dora else None


def uses_dora(file: Path) -> bool:
    """Whether a PEFT config says so."""
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")).get("use_dora"))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from error
