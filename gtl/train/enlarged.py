"""What a run shows of a stage that enlarges: small pictures, what it makes of them, and what they were made of."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch.nn.functional import interpolate

from gtl.evaluate.samples import MAX_BATCH, encode
from gtl.generate.engine import Engine, Small
from gtl.generate.pixels import to_image
from gtl.generate.request import Request
from gtl.images import grid, save_png
from gtl.train.look import SAMPLES, Pictures

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gtl.data.dataset import Dataset
    from gtl.families.base import DiffusionFamily, EnlargingFamily
    from gtl.storage import Store

SHOWN = 4


@dataclass
class Enlarged:
    """Three rows: small pictures as large as they are seen, the same enlarged by the model, and the real ones."""

    pictures: Pictures
    large: Tensor
    """[N, 3, H, W] in [-1, 1]."""
    captions: list[str]

    def draw(self, parts: Mapping[str, nn.Module], run: Store, done: int) -> None:
        """Draw and keep them under `samples/`. Collective: where weights are sharded all ranks have to run it."""
        how = self.pictures
        family, asked = cast("EnlargingFamily", how.trainee.family), how.asked
        height, width = self.large.shape[-2:]
        size = height // family.enlarges, width // family.enlarges
        small = interpolate(self.large, size, mode="bilinear", antialias=True)
        requests = [
            Request(
                caption, height, width, negative_prompt=asked.negative_prompt, seed=asked.seed + i, steps=asked.steps,
                guidance=asked.guidance,
            )
            for i, caption in enumerate(self.captions)
        ]  # fmt: skip
        known = how.encoded(self.captions) or encode(family, parts, requests)
        engine = Engine(family, parts, how.device, torch.float32, MAX_BATCH, encoded=known)
        places = {}
        for i, request in enumerate(requests):
            rng = torch.Generator().manual_seed(request.seed)
            places[engine.add(request, small=Small(small[i].to(how.device), rng))] = i
        drawn: dict[int, Tensor] = {}
        while len(engine):
            with torch.autocast(how.device.type, dtype=torch.bfloat16, enabled=how.dtype == torch.bfloat16):
                finished = engine.step()
            drawn |= {places[o.handle]: pixels for o, pixels in zip(finished, engine.decode(finished), strict=True)}
        if dist.get_rank() == 0:
            given = [*interpolate(small, (height, width)), *self.large]
            shown = [to_image((each / 2 + 0.5).clamp(0, 1)) for each in given]
            row = len(self.large)
            images = [*shown[:row], *(to_image(drawn[i]) for i in range(row)), *shown[row:]]
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "grid.png")
                save_png(grid(images, row), file, {"steps": done})
                run.upload(file, f"{SAMPLES}/{done:08d}.png")


def enlarged_of(pictures: Pictures, held_out: Dataset, trained: Dataset) -> Enlarged:
    """Of the first few pictures of one size, of held-out ones if there are any."""
    side = held_out if held_out.entries else trained
    bucket = side.entries[0].bucket
    alike = [at for at, entry in enumerate(side.entries) if entry.bucket == bucket][:SHOWN]
    items = [side.item(at, 0, 0) for at in alike]
    family = cast("DiffusionFamily", pictures.trainee.family)
    moments = {name: torch.stack([item.latents[name] for item in items]) for name in items[0].latents}
    noise = torch.zeros(moments["mean"].shape)
    return Enlarged(pictures, family.sample_latents(moments, noise), [item.caption for item in items])
