"""Pictures of a model that is being trained, drawn by all ranks through the module that they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from gtl.families import denoising
from gtl.generate.drawing import open_drawer
from gtl.generate.pixels import to_image
from gtl.generate.request import Request

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from gtl.families.base import Conditions, Family
    from gtl.generate.edit import Edit

MAX_BATCH = 4

Item = TypeVar("Item")


def draw_share(
    family: Family,
    parts: Mapping[str, nn.Module],
    requests: Sequence[Request],
    *,
    encoded: Mapping[str, Conditions] | None,
    device: torch.device,
    dtype: torch.dtype,
    edits: Sequence[Edit] = (),
) -> list[Image.Image]:
    """The pictures of this rank's `share` of the requests, in their order. Collective.

    Every rank draws its share in equally many forward passes, as weights that are spread over ranks demand.

    Args:
        family: The model's.
        parts: Its main part as it is trained, the codec, and the encoders if `encoded` is None.
        requests: All of one size, number of steps and kind of guidance.
        encoded: Conditions of every prompt among the requests.
        device: Where the parts are.
        dtype: Of the arithmetic; other than fp32 it runs under autocast.
        edits: What each request begins at, where they are no pictures of prompts alone.
    """
    padded = [*requests, *[requests[-1]] * (-len(requests) % dist.get_world_size())]
    known = encode(family, parts, requests) if encoded is None and family.encoders else encoded
    engine = open_drawer(family, parts, device, torch.float32, MAX_BATCH, known)
    begun = [*edits, *[edits[-1]] * (len(padded) - len(edits))] if edits else [None] * len(padded)
    mine = {
        engine.add(request, edit=edit): turn
        for turn, (request, edit) in enumerate(zip(share(padded), share(begun), strict=True))
    }
    pictures: dict[int, Image.Image] = {}
    while len(engine):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            finished = engine.step()
        for item, pixels in zip(finished, engine.decode(finished), strict=True):
            pictures[mine[item.handle]] = to_image(pixels)
    return [pictures[turn] for turn in range(len(share(requests)))]


def share(items: Sequence[Item]) -> Sequence[Item]:
    """Those that are this rank's to work on."""
    return items[dist.get_rank() :: dist.get_world_size()]


def gather(mine: Iterable[Item], total: int) -> list[Item]:
    """What all ranks made of their `share` of so many, in its order, on rank 0; [] elsewhere. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shares: list[list[Item]] = [[]] * world
    dist.gather_object(list(mine), shares if rank == 0 else None)
    return [shares[position % world][position // world] for position in range(total)] if rank == 0 else []


@torch.inference_mode()
def encode(family: Family, parts: Mapping[str, nn.Module], requests: Sequence[Request]) -> dict[str, Conditions]:
    """Conditions of all texts of all requests. Collective.

    Every rank encodes all of them in the same order: the engine would encode those of its share only, and weights that
    are spread over ranks demand as many forward passes of each.
    """
    family = denoising(family)
    negative = family.negative_text
    texts = {text for request in requests for text in (request.prompt, negative(request.negative_prompt))}
    encoders = {part: parts[part] for part in family.encoders}
    return {text: family.encode_prompts(encoders, [text])[0] for text in sorted(texts)}
