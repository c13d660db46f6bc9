"""Whatever draws a family's pictures, and whether it can draw one: step by step, or in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from gtl.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from gtl.families.base import Conditions, Family
    from gtl.generate.edit import Edit
    from gtl.generate.engine import Output
    from gtl.generate.request import Request

ENGINES = {"by denoising": ("gtl.generate.engine", "Engine"), "at once": ("gtl.generate.at_once", "AtOnce")}
"""`Family.draws` -> the module, which has a `check` too, and the class."""


class Drawer(Protocol):
    """What draws requests, a batch at a time."""

    max_batch: int

    def __len__(self) -> int:
        """Requests that are not through."""
        ...

    def add(self, request: Request, *, edit: Edit | None = None) -> int:
        """Take a request in; its handle."""
        ...

    def encode(self, edit: Edit, request: Request) -> Edit:
        """An edit that `add` need not encode any more."""
        ...

    def step(self) -> list[Output]:
        """Work on the next batch; what is through."""
        ...

    def decode(self, outputs: Sequence[Output]) -> list[Tensor]:
        """Pictures [3, H, W] in [0, 1], fp32 on the CPU."""
        ...


def open_drawer(
    family: Family, parts: Mapping[str, nn.Module], device: str | torch.device, dtype: torch.dtype, max_batch: int,
    encoded: Mapping[str, Conditions] | None = None,
) -> Drawer:  # fmt: skip
    """What draws a family's pictures; see `gtl.generate.engine.Engine`."""
    module, name = ENGINES[family.draws]
    make: Any = getattr(import_module(module), name)
    drawer: Drawer = make(family, parts, device, dtype, max_batch, encoded=encoded)
    return drawer


def check(request: Request, family: Family, edit: Edit | None = None) -> None:
    """Refuse what the family cannot draw, or not from there.

    Raises:
        UserError: names the field, its value and what is allowed.
    """
    if family.draws not in ENGINES:
        raise UserError(f"model: {family.folder}: a model of family {family.name} draws {family.draws}")
    import_module(ENGINES[family.draws][0]).check(request, family, edit)
