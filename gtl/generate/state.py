"""A request on its way through an engine: where in its schedule it is, and what the model reads for its next step."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gtl.adapters.residents import BASE, Seat
from gtl.generate.edit import Edit, Kept
from gtl.generate.request import Request

if TYPE_CHECKING:
    from torch import Tensor

    from gtl.families.base import Conditions


@dataclass
class State:
    """A request on its way. Schedulers keep a history and a counter, so each request has its own."""

    handle: int
    request: Request
    scheduler: Any
    generator: torch.Generator
    """On the CPU, so that a seed draws the same noise on every device."""
    latents: Tensor
    """[1, C, h, w], fp32."""
    conditions: Conditions
    negative: Conditions | None
    """None without guidance."""
    seat: Seat = BASE
    previews: Sequence[int] = ()
    """After which steps an estimate of the picture is wanted."""
    edit: Edit | None = None
    first: int = 0
    """Where in the schedule it began."""
    kept: Kept | None = None
    """What is put back after every step."""
    seen: Tensor | None = None
    """What the model sees of the image that it edits, [1, C, h, w]."""
    codec: Mapping[str, Tensor] = field(default_factory=dict)
    """What its adapters put in place of the codec's own weights."""
    risen: int = 0
    """Steps that finding what it begins at took."""
    down: State | None = None
    """Of a request that is on its way up from an image to the noise that draws it: its way down."""
    index: int = field(init=False)
    """Where in the schedule it is."""
    key: Hashable = field(init=False)
    """Only states of one key share a batch."""

    def __post_init__(self) -> None:
        self.index = self.first
        guided = self.negative and shapes(self.negative)
        self.key = self.seat.company, tuple(self.latents.shape), shapes(self.conditions), guided, self.seen is None

    @property
    def steps_done(self) -> int:
        """Those that it took itself."""
        return self.index - self.first

    def turned(self) -> State:
        """The same request on its way down, from where it has come up to."""
        assert self.down is not None
        self.down.latents, self.down.risen = self.latents, self.steps_done
        return self.down

    @property
    def timestep(self) -> Tensor:
        """The scheduler's next time, a scalar."""
        timestep: Tensor = self.scheduler.timesteps[self.index]
        return timestep

    def model_input(self) -> Tensor:
        """The latents as the model reads them at this step."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return self.latents
        scaled: Tensor = self.scheduler.scale_model_input(self.latents, self.timestep)
        return scaled

    def rows(self) -> list[tuple[Tensor, Conditions]]:
        """What the model reads for this step: latents and conditions of each row of a forward pass.

        Under guidance without the prompt and with it; of one that sees an image before these without that too.
        """
        noisy = self.model_input()
        if self.seen is None:
            return [(noisy, given) for given in (self.negative, self.conditions) if given is not None]
        blind, seeing = (torch.cat([noisy, seen], dim=1) for seen in (torch.zeros_like(self.seen), self.seen))
        if self.negative is None:
            return [(seeing, self.conditions)]
        return [(blind, self.negative), (seeing, self.negative), (seeing, self.conditions)]

    def mean(self, prediction: Tensor) -> Tensor:
        """A prediction [1, C, h, w] without the variance that may be in further channels."""
        return prediction[:, : self.latents.shape[1]]

    def advance(self, prediction: Tensor) -> bool:
        """Take one step with the model's output, see `DiffusionFamily.predict`; whether it was the last."""
        if not str(getattr(self.scheduler, "config", {}).get("variance_type")).startswith("learned"):
            prediction = self.mean(prediction)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": self.generator} if takes_generator else {}
        self.latents = self.scheduler.step(prediction, self.timestep, self.latents, **extra, return_dict=False)[0]
        self.index += 1
        is_last = self.index == len(self.scheduler.timesteps)
        if self.kept is not None:
            self.latents = self.kept.put_back(self.latents, self.scheduler, None if is_last else self.timestep)
        return is_last


def shapes(conditions: Conditions) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes: conditions that agree in them are batched without padding."""
    return tuple(sorted((name, tuple(value.shape)) for name, value in conditions.items()))
