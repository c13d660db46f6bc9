"""A text encoder that is larger than one GPU, over several of them and the machine's memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


RESERVE = 0.15
"""Share of a GPU's free memory for a batch's own tensors."""


def spread(encoder: nn.Module, room: Mapping[int | str, int] | None = None, **options: Any) -> nn.Module:
    """Put an encoder whole onto this process's first GPU, or, where it is too large, layer by layer onto all of them.

    What is left over stays in the machine's memory, from where each layer comes onto the first GPU for its turn.

    Args:
        encoder: One of transformers'; is changed.
        room: Bytes to fill by GPU's number, "cpu" or "disk"; None: what is free, less what a batch takes on GPUs.
        options: Others of accelerate's `dispatch_model`.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_max_memory

    room = room or {
        place: int(free * (1 - RESERVE)) if isinstance(place, int) else free for place, free in get_max_memory().items()
    }
    places = infer_auto_device_map(
        encoder, dict(room),
        no_split_module_classes=sorted(encoder._no_split_modules or ()),  # type: ignore[arg-type]  # of its whole layers
    )  # fmt: skip
    return dispatch_model(encoder, places, **options)
