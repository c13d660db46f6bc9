"""Which adapters can share a forward pass with others, each in a slot."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from gtl.adapters.apply import kind_of
from gtl.adapters.card import Card
from gtl.adapters.formats import MAIN_PARTS, PEFT_CONFIG
from gtl.adapters.read import is_part
from gtl.types import UserError

DORA = "it is a DoRA, which rescales whole weights of the base"


def fits(adapter: Card | Path) -> str | None:
    """Why an adapter, by its card or its folder, cannot share a forward pass with others; None: it can.

    Whether its layers and ranks are those of the slots, `Slots.read` finds.

    Raises:
        UserError: there is no adapter in the folder, or it is damaged.
    """
    if isinstance(adapter, Card):
        kind, dora = adapter.kind, bool(adapter.tuner.get("dora"))
        configs = [PurePosixPath(file) for file in adapter.files if PurePosixPath(file).name == PEFT_CONFIG]
    else:
        kind = kind_of(adapter)
        found = [*adapter.glob(PEFT_CONFIG), *adapter.glob(f"*/{PEFT_CONFIG}")]
        dora = any(uses_dora(file) for file in found)
        configs = [PurePosixPath(file.relative_to(adapter).as_posix()) for file in found]
    if kind != "lora":
        return f"it is a {kind}, which replaces weights of the base"
    if dora:
        return DORA
    parts = sorted(file.parent.name for file in configs if is_part(file.parent.name))
    encoders = [part for part in parts if part not in MAIN_PARTS]
    return f"it changes {', '.join(encoders)}, and prompts are encoded before the batch" if encoders else None


def uses_dora(file: Path) -> bool:
    """Whether a PEFT config says so."""
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")).get("use_dora"))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from error
