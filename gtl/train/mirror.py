"""What a run shows of a codec: pictures beside what it makes of them, and what its latents mean."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from gtl.families import denoising
from gtl.generate.pixels import to_image
from gtl.images import grid, save_png
from gtl.train.look import SAMPLES, Pictures

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gtl.data.dataset import Dataset
    from gtl.storage import Store

SHOWN = 5
"""Pictures, and places along a latent."""
TRAVERSED = 4
"""Latent channels, those that differ most between the pictures."""
FAR = 2.0
"""How far a latent is moved, in standard deviations of the pictures' own."""


@dataclass
class Mirror:
    """Rows of five: pictures, what the codec makes of them, and the first one with one latent channel moved at a time,
    by -2 to 2 standard deviations (a latent traversal, as of Higgins et al. 2017, beta-VAE)."""

    pictures: Pictures
    pixels: Tensor
    """[N, 3, H, W], uint8."""

    def draw(self, parts: Mapping[str, nn.Module], run: Store, done: int) -> None:
        """Draw and keep them under `samples/`. Collective: where weights are sharded all ranks have to run it."""
        how = self.pictures
        family = denoising(how.trainee.family)
        codec = parts[str(family.codec)]
        pixels = self.pixels.to(how.device, torch.float32).div(127.5).sub(1)
        with torch.autocast(how.device.type, dtype=torch.bfloat16, enabled=how.dtype == torch.bfloat16):
            moments = family.encode_images(codec, pixels)
            latents = family.sample_latents(moments, torch.zeros_like(moments["mean"])).float()
            # One by one, as large as the pictures themselves: decoding is the peak of memory.
            drawn = [family.decode(codec, each[None])[0] for each in (*latents, *traversal(latents))]
        if dist.get_rank() == 0:
            images = [to_image((each.float() / 2 + 0.5).clamp(0, 1).cpu()) for each in (*pixels, *drawn)]
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "grid.png")
                save_png(grid(images, len(self.pixels)), file, {"steps": done})
                run.upload(file, f"{SAMPLES}/{done:08d}.png")


def traversal(latents: Tensor) -> list[Tensor]:
    """The first of some latents [N, C, h, w] with a channel moved, N places for each channel."""
    spread = latents.std((0, 2, 3), correction=0)
    moved = []
    for channel in spread.argsort(descending=True)[:TRAVERSED].tolist():
        for by in torch.linspace(-FAR, FAR, len(latents)).tolist():
            one = latents[0].clone()
            one[channel] += by * spread[channel]
            moved.append(one)
    return moved


def mirror_of(pictures: Pictures, held_out: Dataset, trained: Dataset) -> Mirror | None:
    """Of the first few pictures of one size, of held-out ones if there are any; None of a model that draws none."""
    if pictures.trainee.family.draws == "nothing":
        return None
    side = held_out if held_out.entries else trained
    bucket = side.entries[0].bucket
    alike = [at for at, entry in enumerate(side.entries) if entry.bucket == bucket][:SHOWN]
    pixels = [item.pixels for at in alike if (item := side.item(at, 0, 0)).pixels is not None]
    return Mirror(pictures, torch.stack(pixels)) if pixels else None
