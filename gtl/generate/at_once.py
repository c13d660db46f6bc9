"""Pictures of models that make them of noise in one pass, behind the verbs of the denoising engine."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from gtl.generate.engine import Output
from gtl.generate.request import Request
from gtl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gtl.families.base import Conditions, NoiseFamily
    from gtl.generate.edit import Edit


def check(request: Request, family: NoiseFamily, edit: Edit | None = None) -> None:
    """Refuse what the family cannot draw; steps and guidance mean nothing to it, and are not looked at.

    Raises:
        UserError: names the field, its value and what is allowed.
    """
    for name in ("prompt", "negative_prompt"):
        if text := getattr(request, name):
            raise UserError(f"{name}: {text!r}: a model of family {family.name} draws from noise alone; leave it out")
    if not 0 <= request.seed < 2**63:
        raise UserError(f"seed: {request.seed}: expected 0 to 2**63 - 1")
    height, width = family.default_size
    if (request.height, request.width) != (height, width):
        raise UserError(f"width: {request.width}: this model draws {width}x{height} only; leave width and height out")
    if edit is not None:
        raise UserError(f"model: a model of family {family.name} draws from noise alone and edits no picture")


class AtOnce:
    """Draws the requests that wait, a batch in a step. A seed's picture does not depend on the batch."""

    def __init__(
        self, family: NoiseFamily, parts: Mapping[str, nn.Module], device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32, max_batch: int = 4, *, encoded: Mapping[str, Conditions] | None = None,
    ) -> None:  # fmt: skip
        """`parts` has the main part, on the device and in `dtype`; nothing is ever `encoded`."""
        self.family, self.max_batch = family, max_batch
        self._main, self._device, self._dtype = parts[family.main], torch.device(device), dtype
        self._waiting: dict[int, Request] = {}
        self._handles = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: Request, *, edit: Edit | None = None) -> int:
        """Take a request in; its handle comes back with the picture.

        Raises:
            UserError: see `check`.
        """
        check(request, self.family, edit)
        handle = next(self._handles)
        self._waiting[handle] = request
        return handle

    def encode(self, edit: Edit, request: Request) -> Edit:
        """Never.

        Raises:
            UserError: always.
        """
        check(request, self.family, edit)
        return edit

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Draw the next batch."""
        batch = dict(itertools.islice(self._waiting.items(), self.max_batch))
        if not batch:
            return []
        noise = torch.cat([noise_of(request.seed, self.family.noise_size) for request in batch.values()])
        pixels = self._main(noise.to(self._device, self._dtype)).float()
        for handle in batch:
            del self._waiting[handle]
        return [
            Output(handle, request, picture)
            for (handle, request), picture in zip(batch.items(), pixels.split(1), strict=True)
        ]

    def decode(self, outputs: Sequence[Output]) -> list[Tensor]:
        """Pictures [3, H, W] in [0, 1], fp32 on the CPU, in the order given."""
        return [(item.latents[0] / 2 + 0.5).clamp(0, 1).cpu() for item in outputs]


def noise_of(seed: int, size: int) -> Tensor:
    """What a seed's picture is made of, [1, size]; drawn on the CPU, so it is the same on every device."""
    return torch.randn(1, size, generator=torch.Generator().manual_seed(seed))
