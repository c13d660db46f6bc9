"""Pictures of two stages: one draws them small, the other enlarges them (Ho et al. 2021, arXiv 2106.15282)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from gtl.adapters import apply
from gtl.families import denoising
from gtl.generate.engine import Engine, Output, Small
from gtl.generate.request import check
from gtl.types import Sampler, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gtl.families.base import EnlargingFamily, Family
    from gtl.generate.edit import Edit
    from gtl.generate.request import Request


@dataclass(frozen=True)
class Upscaler:
    """A stage that enlarges, and how."""

    family: Family
    adapters: tuple[tuple[Path, float], ...] = ()
    """Published folders with their scales."""
    steps: int = 25
    guidance: float = 4.0
    sampler: Sampler = "model"

    def enlarging(self) -> EnlargingFamily:
        """Its family.

        Raises:
            UserError: it does not enlarge.
        """
        if self.family.draws_alone:
            raise UserError(f"upscaler: {self.family.folder}: a model of family {self.family.name} enlarges nothing")
        return cast("EnlargingFamily", self.family)

    def smaller(self, request: Request) -> Request:
        """What the first stage is asked for.

        Raises:
            UserError: a side is no multiple of the scale, and of what else the upscaler needs.
        """
        family = self.enlarging()
        check(self.own(request), family, enlarges=True)
        scale = family.enlarges
        return replace(request, height=request.height // scale, width=request.width // scale)

    def own(self, request: Request) -> Request:
        """What this one is asked for."""
        return replace(request, steps=self.steps, guidance=self.guidance, sampler=self.sampler)


def check_cascade(request: Request, first: Family, upscaler: Upscaler) -> None:
    """Refuse what the two cannot draw together; `request` is of the large picture.

    Raises:
        UserError: names the field, its value and what is allowed.
    """
    family, small = upscaler.enlarging(), upscaler.smaller(request)
    try:
        family.lent(denoising(first))
    except UserError as error:
        raise UserError(f"upscaler: {error}") from None
    try:
        check(small, denoising(first))
    except UserError as error:
        raise UserError(f"{error}; it is enlarged {family.enlarges} times") from None


class Cascade:
    """Draws requests of large pictures by the engines of both stages, behind the verbs of `Drawer`.

    The first stage's encoder reads the prompts for both, as the published cascades share theirs.
    """

    def __init__(self, first: Engine, second: Engine, upscaler: Upscaler) -> None:
        """`second` has the family of the upscaler, lent to the first."""
        self._first, self._second, self._upscaler = first, second, upscaler
        self.max_batch = first.max_batch
        self._handles = itertools.count()
        self._small: dict[int, tuple[int, Request]] = {}
        self._large: dict[int, tuple[int, Request]] = {}

    def __len__(self) -> int:
        return len(self._small) + len(self._large)

    def add(self, request: Request, *, edit: Edit | None = None) -> int:
        """Take a request in; its handle comes back with the picture.

        Raises:
            UserError: see `check_cascade`, or it is an edit.
        """
        if edit is not None:
            raise UserError("upscaler: a cascade draws from noise and edits no picture; edit with one of its stages")
        handle = next(self._handles)
        self._small[self._first.add(self._upscaler.smaller(request))] = handle, request
        return handle

    def encode(self, edit: Edit, request: Request) -> Edit:
        """Never.

        Raises:
            UserError: always.
        """
        raise UserError("upscaler: a cascade draws from noise and edits no picture; edit with one of its stages")

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Take one step of each stage; what of the second is through."""
        for output in self._first.step():
            handle, request = self._small.pop(output.handle)
            assert output.generator is not None
            small = Small(output.latents[0], output.generator)
            self._large[self._second.add(self._upscaler.own(request), small=small)] = handle, request
        found = []
        for output in self._second.step():
            handle, request = self._large.pop(output.handle)
            found.append(replace(output, handle=handle, request=request))
        return found

    def decode(self, outputs: Sequence[Output]) -> list[Tensor]:
        """Pictures [3, H, W] in [0, 1], fp32 on the CPU, in the order given."""
        return self._second.decode(outputs)


def open_cascade(
    first: Family, parts: Mapping[str, nn.Module], upscaler: Upscaler, device: str, dtype: torch.dtype, max_batch: int
) -> Cascade:  # fmt: skip
    """Load the upscaler beside the parts of the first stage, which read prompts for it.

    Raises:
        UserError: an adapter or the model's files are wrong, or the two do not go together.
    """
    family = upscaler.enlarging().lent(denoising(first))
    own = {family.main: family.load(family.main, dtype, device)}
    for number, (folder, scale) in enumerate(upscaler.adapters):
        apply(own, folder, f"upscaler{number}", scale)
    readers = {name: parts[name] for name in family.encoders}
    engines = (Engine(denoising(first), parts, device, dtype, max_batch),
               Engine(family, {**own, **readers}, device, dtype, max_batch))  # fmt: skip
    return Cascade(*engines, upscaler)
