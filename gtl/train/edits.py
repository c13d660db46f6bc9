"""What a run shows of a model that learns to edit: images, what it makes of them, and what they were to become."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gtl.evaluate.samples import draw_share, gather
from gtl.families import denoising
from gtl.generate.edit import IMAGE_GUIDANCE, Edit
from gtl.generate.pixels import to_image
from gtl.generate.request import Request
from gtl.images import grid, save_png
from gtl.train.look import SAMPLES, Pictures

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

    from gtl.data.dataset import Dataset
    from gtl.storage import Store
    from gtl.types import Item

SHOWN = 4
COLUMNS = 3


@dataclass
class Edits:
    """Rows of three."""

    pictures: Pictures
    items: list[Item]
    """Of one size."""

    def draw(self, parts: Mapping[str, nn.Module], run: Store, done: int) -> None:
        """Draw and keep them under `samples/`. Collective; rank 0 writes."""
        how, shown = self.pictures, self.pictures.asked
        before = [self._decoded(parts, item.original or {}) for item in self.items]
        after = [self._decoded(parts, item.latents) for item in self.items]
        requests = [
            Request(
                item.caption, *item.geometry.target, negative_prompt=shown.negative_prompt, seed=shown.seed + i,
                steps=shown.steps, guidance=shown.guidance,
            )
            for i, item in enumerate(self.items)
        ]  # fmt: skip
        edits = [
            Edit(image, image_guidance=IMAGE_GUIDANCE, moments=self._moments(item.original or {}))
            for image, item in zip(before, self.items, strict=True)
        ]
        encoded = how.encoded([item.caption for item in self.items])
        mine = draw_share(
            how.trainee.family, parts, requests, encoded=encoded, device=how.device, dtype=how.dtype, edits=edits
        )
        if drawn := gather(mine, len(requests)):
            rows = [image for row in zip(before, drawn, after, strict=True) for image in row]
            recipe = {"prompts": [item.caption for item in self.items], "seed": shown.seed, "steps": done}
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "grid.png")
                save_png(grid(rows, COLUMNS), file, recipe)
                run.upload(file, f"{SAMPLES}/{done:08d}.png")

    def _moments(self, moments: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value.float()[None].to(self.pictures.device) for name, value in moments.items()}

    @torch.inference_mode()
    def _decoded(self, parts: Mapping[str, nn.Module], moments: Mapping[str, Any]) -> Image:
        """A picture as it comes back from the codec, which is all that can be asked for."""
        family, told = denoising(self.pictures.trainee.family), self._moments(moments)
        latents = family.sample_latents(told, torch.zeros_like(told["mean"]))
        pixels = family.decode(parts[str(family.codec)], latents)[0].float()
        return to_image((pixels / 2 + 0.5).clamp(0, 1).cpu())


def edits_of(pictures: Pictures, held_out: Dataset, trained: Dataset) -> Edits:
    """Of the first few pairs of one size, of held-out ones if there are any."""
    side = held_out if held_out.entries else trained
    bucket = side.entries[0].bucket
    alike = [at for at, entry in enumerate(side.entries) if entry.bucket == bucket][:SHOWN]
    return Edits(pictures, [side.item(at, 0, 0) for at in alike])
