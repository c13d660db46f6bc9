"""From requests to pictures: the parts are loaded once, adapters put on, the engine kept busy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from gtl.adapters import apply
from gtl.adapters.base import model_parts
from gtl.generate.cascade import check_cascade, open_cascade
from gtl.generate.drawing import Drawer, check, open_drawer
from gtl.generate.pixels import to_image
from gtl.types import UserError, quiet

if TYPE_CHECKING:
    from torch import nn

    from gtl.families.base import Family
    from gtl.generate.cascade import Upscaler
    from gtl.generate.edit import Edit
    from gtl.generate.request import Request
    from gtl.types import Progress


def generate(
    family: Family,
    requests: Sequence[Request],
    adapters: Sequence[tuple[Path, float]] = (),
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_batch: int = 4,
    edit: Edit | None = None,
    upscaler: Upscaler | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Image.Image]]:
    """Draw the requests; yields (position in `requests`, picture) as they are done, not always in order.

    `adapters` are published folders with their scales, all active at once; `edit` is what all requests begin at, if it
    is not noise; `upscaler` enlarges what is drawn to the size that is asked for. Nothing is loaded before the first
    request is asked for and none at all when one of them is refused.

    Raises:
        UserError: a request, an adapter or the model's files are wrong.
    """
    for request in requests:
        if upscaler is None:
            check(request, family, edit)
        else:
            check_cascade(request, family, upscaler)
    if not requests:
        return
    (progress or quiet)("load", 0, 0)
    parts = load_parts(family, adapters, device=device, dtype=dtype)
    drawer: Drawer = (
        open_drawer(family, parts, device, dtype, max_batch) if upscaler is None
        else open_cascade(family, parts, upscaler, device, dtype, max_batch)
    )  # fmt: skip
    yield from draw(drawer, requests, progress, edit)


def draw(
    engine: Drawer, requests: Sequence[Request], progress: Progress | None = None, edit: Edit | None = None
) -> Iterator[tuple[int, Image.Image]]:
    """Draw the requests on an engine that has no others; see `generate`.

    Raises:
        UserError: a request is wrong, or what is drawn is NaN.
    """
    show = progress or quiet
    waiting = iter(enumerate(requests))
    positions: dict[int, int] = {}
    done = 0
    show("draw", done, len(requests))
    while True:
        # A few more than fit, so that one that waits takes the place of one that is through.
        while len(engine) < 2 * engine.max_batch and (following := next(waiting, None)) is not None:
            edit = None if edit is None else engine.encode(edit, following[1])
            positions[engine.add(following[1], edit=edit)] = following[0]
        if not len(engine):
            return
        finished = engine.step()
        for item, pixels in zip(finished, engine.decode(finished), strict=True):
            index = positions.pop(item.handle)
            if pixels.isnan().any():
                raise UserError(
                    f"{requests[index].prompt!r}, seed {requests[index].seed}: the model draws NaN, no picture; "
                    "weights are damaged, or an adapter's scale is far too large"
                )
            done += 1
            show("draw", done, len(requests))
            yield index, to_image(pixels)


def load_parts(
    family: Family, adapters: Sequence[tuple[Path, float]], *, device: str, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """What drawing needs, on the device, with the adapters on it; and what else these move.

    The codec is fp32 whatever `dtype`: it runs once a picture, and in bf16 its rounding shows.
    """
    wanted = [part for part in model_parts(family) if adapters or part not in family.critics]
    parts = {part: family.load(part, torch.float32 if part == family.codec else dtype, device) for part in wanted}
    for index, (folder, scale) in enumerate(adapters):
        apply(parts, folder, f"adapter{index}", scale)
    return parts
