"""One picture to draw, and what of it a model refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gtl.families import denoising
from gtl.generate.edit import Edit, check_edit
from gtl.types import GUIDANCE, Sampler, UserError

if TYPE_CHECKING:
    from gtl.families.base import DiffusionFamily, Family

LCM_STEPS = 50
"""More than diffusers' LCMScheduler knows there are none."""


@dataclass(frozen=True)
class Request:
    """One picture to draw."""

    prompt: str
    height: int
    """In pixels, as is the width."""
    width: int
    negative_prompt: str = ""
    """What classifier-free guidance leads away from; "" is none, see `DiffusionFamily.unconditional`. Distilled models
    take none."""
    seed: int = 0
    """Decides the picture, together with the other fields; the batch it is drawn in does not."""
    steps: int = 25
    guidance: float = 7.5
    """Scale of classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598); 1 and below is off. A distilled model
    reads any scale, or none."""
    sampler: Sampler = "model"


def sampled_by(request: Request, sampler: Sampler, family: Family) -> Request:
    """The request as a model is asked that was taught for a sampler: one for few steps has learned its guidance."""
    if sampler == "model":
        return request
    guidance = GUIDANCE[sampler] if denoising(family).classifier_free else request.guidance
    return replace(request, sampler=sampler, guidance=guidance)


def check(
    request: Request, family: DiffusionFamily, edit: Edit | None = None, *, enlarges: bool = False
) -> None:  # fmt: skip
    """Refuse what the family cannot draw, or not from there; `enlarges` if it is given a smaller picture.

    Raises:
        UserError: names the field, its value and what is allowed.
    """
    if not (family.draws_alone or enlarges):
        raise UserError(
            f"model: a model of family {family.name} only enlarges pictures; draw with its first stage as the model, "
            "and with it as the upscaler of `gtl generate`"
        )
    most = family.path.num_train_timesteps - 1  # some schedulers start one time later
    if request.sampler == "lcm":
        most = min(most, LCM_STEPS)
    if not 1 <= request.steps <= most:
        raise UserError(f"steps: {request.steps}: expected 1 to {most}")
    if not (math.isfinite(request.guidance) and request.guidance >= 0):
        raise UserError(f"guidance: {request.guidance:g}: expected a number >= 0; 1 and below is no guidance")
    if not 0 <= request.seed < 2**63:
        raise UserError(f"seed: {request.seed}: expected 0 to 2**63 - 1")
    if request.negative_prompt and not family.classifier_free:
        raise UserError(
            f"negative_prompt: {request.negative_prompt!r}: a model of family {family.name} is guided without one; "
            "leave it out"
        )
    for name, pixels in (("height", request.height), ("width", request.width)):
        if family.max_size is not None and pixels > family.max_size:
            raise UserError(f"{name}: {pixels}: expected at most {family.max_size}")
        if pixels < family.multiple or pixels % family.multiple:
            below = max(0, pixels // family.multiple * family.multiple)
            close = [size for size in (below, below + family.multiple) if size > 0]
            raise UserError(
                f"{name}: {pixels}: expected a multiple of {family.multiple}, such as {' or '.join(map(str, close))}"
            )
    if edit is not None:
        check_edit(edit, request, family)
