"""Many requests in one denoising batch, each with its own seed, number of steps, guidance and place in its schedule.

The unit of work is one step of one batch: requests join and leave between any two steps. Nothing here knows who asks.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gtl.types import Geometry, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gtl.families.base import Conditions, DiffusionFamily

DECODE_BATCH = 4
"""Decoding is the peak of memory, so its batches have a bound of their own."""
CACHED_PROMPTS = 256


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


def check(request: Request, family: DiffusionFamily) -> None:
    """Refuse what the family cannot draw.

    Raises:
        UserError: names the field, its value and what is allowed.
    """
    most = family.path.num_train_timesteps - 1  # some schedulers start one time later
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
    index: int = 0
    """Steps done."""
    key: Hashable = field(init=False)
    """Only states of one key share a batch."""

    def __post_init__(self) -> None:
        self.key = tuple(self.latents.shape), shapes(self.conditions), self.negative and shapes(self.negative)

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

    def advance(self, prediction: Tensor) -> bool:
        """Take one step with the model's output [1, C, h, w]; whether it was the last."""
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": self.generator} if takes_generator else {}
        self.latents = self.scheduler.step(prediction, self.timestep, self.latents, **extra, return_dict=False)[0]
        self.index += 1
        return self.index == len(self.scheduler.timesteps)


@dataclass(frozen=True)
class Finished:
    """A denoised request, before decoding."""

    handle: int
    request: Request
    latents: Tensor
    """[1, C, h, w], fp32."""


class Engine:
    """Denoises any number of requests on one model, up to `max_batch` of them in a step."""

    def __init__(
        self,
        family: DiffusionFamily,
        parts: Mapping[str, nn.Module],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        max_batch: int = 4,
        encoded: Mapping[str, Conditions] | None = None,
    ) -> None:
        """`parts` are on the device: the main part and the encoders in `dtype`, the codec in its own.

        Without encoders the prompts are those that were `encoded` before.
        """
        self.family, self.parts = family, parts
        self.device, self.dtype, self.max_batch = torch.device(device), dtype, max_batch
        self._states: dict[int, State] = {}
        self._handles = itertools.count()
        self._prompts: OrderedDict[str, Conditions] = OrderedDict(encoded or {})

    def __len__(self) -> int:
        return len(self._states)

    @torch.inference_mode()
    def add(self, request: Request) -> int:
        """Take a request in; its handle comes back with the result.

        Raises:
            UserError: the family cannot draw it; see `check`.
        """
        check(request, self.family)
        scheduler = self.family.sampler(request.steps, request.height, request.width)
        generator = torch.Generator().manual_seed(request.seed)
        shape = (1, *self.family.latent_shape(request.height, request.width))
        guided = self.family.classifier_free and request.guidance > 1
        noise = torch.randn(shape, generator=generator).to(self.device)
        state = State(
            handle=next(self._handles),
            request=request,
            scheduler=scheduler,
            generator=generator,
            latents=noise * getattr(scheduler, "init_noise_sigma", 1.0),
            conditions=self._completed(self._encoded(request.prompt), request),
            negative=self._completed(self._negative(request.negative_prompt), request) if guided else None,
        )
        self._states[state.handle] = state
        return state.handle

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Take one step of the oldest request and of those that can share its batch; the ones that are through."""
        batch = self._batch()
        if not batch:
            return []
        finished = []
        for state, prediction in zip(batch, self._predict(batch).split(1), strict=True):
            if state.advance(prediction):
                del self._states[state.handle]
                finished.append(Finished(state.handle, state.request, state.latents))
        return finished

    @torch.inference_mode()
    def decode(self, finished: Sequence[Finished]) -> list[Tensor]:
        """Pictures [3, H, W] in [0, 1], fp32 on the CPU, in the order given."""
        codec = self.parts[self.family.codec] if self.family.codec else None
        dtype = next(codec.parameters()).dtype if codec is not None else torch.float32
        pictures: list[Tensor] = []
        for _, group in itertools.groupby(finished, key=lambda item: item.latents.shape):
            for chunk in torch.cat([item.latents for item in group]).split(DECODE_BATCH):
                pixels = self.family.decode(codec, chunk.to(dtype)).float()
                pictures += (pixels / 2 + 0.5).clamp(0, 1).cpu().unbind()
        return pictures

    def _batch(self) -> list[State]:
        oldest = next(iter(self._states.values()), None)
        if oldest is None:
            return []
        fitting = (state for state in self._states.values() if state.key == oldest.key)
        return list(itertools.islice(fitting, self.max_batch))

    def _predict(self, batch: Sequence[State]) -> Tensor:
        """The model's outputs [B, C, h, w] in fp32; under guidance every state is two rows of the forward pass."""
        noisy = torch.cat([state.model_input() for state in batch])
        t = torch.stack([state.timestep for state in batch])
        conditions = [state.conditions for state in batch]
        negatives = [state.negative for state in batch if state.negative is not None]
        if negatives:
            noisy, t, conditions = torch.cat([noisy, noisy]), torch.cat([t, t]), negatives + conditions
        main = self.parts[self.family.main]
        inputs = noisy.to(self.dtype), t.to(self.device), self.family.collate(conditions)
        prediction = self.family.predict(main, *inputs).float()
        if not negatives:
            return prediction
        scale = torch.tensor([state.request.guidance for state in batch], device=self.device).view(-1, 1, 1, 1)
        unconditional, conditional = prediction.chunk(2)
        return self.family.guide(unconditional, conditional, scale)

    def _encoded(self, prompt: str) -> Conditions:
        # One by one, so that a prompt's embedding does not depend on its neighbours.
        if prompt not in self._prompts:
            encoders = {part: self.parts[part] for part in self.family.encoders}
            self._prompts[prompt] = self.family.encode_prompts(encoders, [prompt])[0]
            if len(self._prompts) > CACHED_PROMPTS:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(prompt)
        return self._prompts[prompt]

    def _negative(self, prompt: str) -> Conditions:
        encoded = self._encoded(self.family.negative_text(prompt))
        return encoded if prompt else self.family.unconditional(encoded)

    def _completed(self, conditions: Conditions, request: Request) -> Conditions:
        size = (request.height, request.width)
        sizes = self.family.size_conditions(Geometry(original=size, crop=(0, 0), target=size))
        guidance = self.family.guidance_conditions(request.guidance)
        return {name: value.to(self.device) for name, value in {**conditions, **sizes, **guidance}.items()}


def shapes(conditions: Conditions) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes: conditions that agree in them are batched without padding."""
    return tuple(sorted((name, tuple(value.shape)) for name, value in conditions.items()))
