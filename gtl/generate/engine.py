"""Many requests in one denoising batch, each with its own adapters, seed, steps, guidance and place in its schedule.

The unit of work is one step of one batch: requests join and leave between any two steps. Nothing here knows who asks.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from gtl.adapters.residents import BASE, Adapters, Residents, Seat
from gtl.diffusion.solver import Rising, Solver
from gtl.families.wide import is_wide
from gtl.generate.codec import wearing
from gtl.generate.edit import Edit, begin, check_shown, encode, finish
from gtl.generate.request import Request, check
from gtl.generate.state import State
from gtl.types import Geometry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gtl.families.base import Conditions, DiffusionFamily, EnlargingFamily

DECODE_BATCH = 4
"""Decoding is the peak of memory, so its batches have a bound of their own."""
CACHED_PROMPTS = 256


@dataclass(frozen=True)
class Output:
    """What is to be decoded of a request: the picture, or an estimate of it on the way."""

    handle: int
    request: Request
    latents: Tensor
    """[1, C, h, w], fp32."""
    preview: int | None = None
    """Which estimate it is, from 0; None: it is the picture, and the request is through."""
    edit: Edit | None = None
    """What it began at."""
    codec: Mapping[str, Tensor] = field(default_factory=dict)
    """As of its state."""
    generator: torch.Generator | None = None
    """Of a picture that is through, as it left it: what goes on from here draws on."""

    @property
    def alike(self) -> tuple[torch.Size, list[int]]:
        """What those have in common that are decoded together."""
        return self.latents.shape, [id(value) for value in self.codec.values()]


@dataclass(frozen=True, eq=False)
class Small:
    """What a request enlarges."""

    picture: Tensor
    """[3, h, w] in [-1, 1]."""
    generator: torch.Generator
    """Draws on where the small picture left it, rather than its noise once more."""


class Engine:
    """Denoises any number of requests on one model, as many in a step as the bounds allow.

    Requests of different shapes, or with adapters that cannot share a pass, take turns: the next step is that of those
    who have had least work done so far (start-time fair queuing, Goyal et al. 1996).
    """

    def __init__(
        self,
        family: DiffusionFamily,
        parts: Mapping[str, nn.Module],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        max_batch: int = 4,
        *,
        max_pixels: int | None = None,
        encoded: Mapping[str, Conditions] | None = None,
        residents: Residents | None = None,
        compile: bool = False,
    ) -> None:
        """`parts` are on the device: the main part and the encoders in `dtype`, the codec in its own.

        Args:
            family: The model's.
            parts: See above. Without encoders the prompts are those that were `encoded` before.
            device: Where they are.
            dtype: Of the arithmetic.
            max_batch: Pictures of a step at most.
            max_pixels: Of a step's pictures together; a larger picture is drawn alone. None: any.
            encoded: Conditions of prompts.
            residents: The adapters that requests can have a seat with; steady ones (see `Slots`) where it is compiled.
            compile: Let torch.compile make one graph of the main part for each of some batch sizes and each shape of
                pictures; a batch in between is filled up. Slow at the first step of each, faster afterwards.
        """
        self.family, self.parts, self.residents = family, parts, residents
        self.device, self.dtype = torch.device(device), dtype
        self.max_batch, self.max_pixels = max_batch, max_pixels
        self._sizes = batch_sizes(max_batch) if compile else ()
        self._main: nn.Module = parts[family.main]
        self._edits = is_wide(self._main)
        """Whether the model sees an image with whatever adapters."""
        if compile:
            self._main = cast("nn.Module", torch.compile(self._main, dynamic=False))
        self._states: dict[int, State] = {}
        self._handles = itertools.count()
        self._codec_lock = threading.Lock()
        """Some codecs keep what they are at in themselves."""
        self._prompts: OrderedDict[tuple[Adapters, str], Conditions] = OrderedDict(
            {((), prompt): conditions for prompt, conditions in (encoded or {}).items()}
        )
        self.batch: tuple[int, ...] = ()
        """Handles of the requests in the last step."""
        self._work: dict[Hashable, int] = {}
        """Pixels denoised so far, by the key of those who share batches."""

    def __len__(self) -> int:
        return len(self._states)

    @torch.inference_mode()
    def add(
        self, request: Request, seat: Seat = BASE, previews: Sequence[int] = (), edit: Edit | None = None,
        small: Small | None = None,
    ) -> int:  # fmt: skip
        """Take a request in; its handle comes back with what is drawn.

        Args:
            request: The picture.
            seat: Of its adapters, which it leaves when it is through, cancelled or refused.
            previews: After which steps an estimate of the picture is wanted, counted from where it begins.
            edit: What to begin at, if it is not noise.
            small: What to enlarge, for a family that does.

        Raises:
            UserError: the family cannot draw it; see `check`.
        """
        try:
            state = self._begin(request, seat, previews, edit, small)
        except BaseException:
            self._leave(seat)
            raise
        self._states[state.handle] = state
        return state.handle

    @torch.inference_mode()
    def encode(self, edit: Edit, request: Request, own: Mapping[str, Tensor] = {}) -> Edit:
        """An edit that `add` need not encode any more, for this request or others; from any thread.

        Args:
            edit: What they begin at.
            request: One of them.
            own: What their adapters put in place of the codec's weights.

        Raises:
            UserError: the family cannot draw it; see `check`.
        """
        check(request, self.family, edit)
        if edit.moments is not None:
            return edit
        codec = self.parts[self.family.codec] if self.family.codec else None
        with self._codec_lock, wearing(codec, own):
            return replace(edit, moments=encode(edit, self.family, codec, self.device))

    def _rise(self, shows: str, down: State) -> State:
        """On the way to what a request begins at: the latents that a `Solver` draws its image from."""
        request = down.request
        return State(
            handle=down.handle,
            request=request,
            scheduler=Rising(self.family.path, request.steps, request.steps - down.first),
            generator=torch.Generator(),
            latents=down.latents,
            conditions=self._completed(self._encoded(shows, down.seat), replace(request, guidance=1.0)),
            negative=None,
            seat=down.seat,
            down=down,
        )

    def _begin(
        self, request: Request, seat: Seat, previews: Sequence[int], edit: Edit | None, small: Small | None
    ) -> State:
        check(request, self.family, edit, enlarges=small is not None)
        check_shown(edit, self._edits or seat.edits)
        generator = torch.Generator().manual_seed(request.seed) if small is None else small.generator
        by_image = edit is not None and edit.image_guidance is not None and edit.image_guidance > 1
        guided = self.family.classifier_free and (request.guidance > 1 or by_image)
        codec = {} if self.residents is None else self.residents.own(seat, self.family.codec)
        edit = None if edit is None else self.encode(edit, request, codec)
        if edit is not None and edit.shows is not None:
            scheduler: Any = Solver(self.family.path, request.steps)
        else:
            scheduler = self.family.sampler(request.steps, request.height, request.width, request.sampler)
        start = begin(edit, request, self.family, scheduler, generator, self.device)
        family, size = cast("EnlargingFamily", self.family), (request.height, request.width)
        given = {} if small is None else family.enlarging(small.picture, *size, generator)

        def completed(conditions: Conditions) -> Conditions:
            return self._completed({**conditions, **given}, request)

        state = State(
            handle=next(self._handles),
            request=request,
            scheduler=scheduler,
            generator=generator,
            latents=start.latents,
            conditions=completed(self._encoded(request.prompt, seat)),
            negative=completed(self._negative(request.negative_prompt, seat)) if guided else None,
            seat=seat,
            previews=previews,
            edit=edit,
            first=start.first,
            kept=start.kept,
            seen=start.seen,
            codec=codec,
        )
        return state if edit is None or edit.shows is None else self._rise(edit.shows, state)

    def cancel(self, handle: int) -> None:
        """Drop a request between two steps. One that is through is none any more."""
        if (state := self._states.pop(handle, None)) is not None:
            self._leave(state.seat)

    def steps_done(self, handle: int) -> int:
        """Of a request, those up to the noise of its image among them; 0 of one that is not here."""
        state = self._states.get(handle)
        return 0 if state is None else state.risen + state.steps_done

    def _leave(self, seat: Seat) -> None:
        if self.residents is not None:
            self.residents.leave(seat)

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Take one step of the requests whose turn it is; what came of it."""
        batch = self._batch()
        self.batch = tuple(state.handle for state in batch)
        if not batch:
            return []
        outputs = []
        for state, prediction in zip(batch, self._predict(batch)[: len(batch)].split(1), strict=True):
            if state.down is not None:
                if state.advance(prediction):
                    self._states[state.handle] = state.turned()
                continue
            wanted = state.steps_done + 1 in state.previews
            estimate = self._estimate(state, prediction) if wanted else None
            if state.advance(prediction):
                self.cancel(state.handle)
                of = state.edit, state.codec, state.generator
                outputs.append(Output(state.handle, state.request, state.latents, None, *of))
            elif estimate is not None:
                number = state.previews.index(state.steps_done)
                outputs.append(Output(state.handle, state.request, estimate, number, state.edit, state.codec))
        return outputs

    def _estimate(self, state: State, prediction: Tensor) -> Tensor:
        """The picture that a prediction stands for, before the sampler makes its step."""
        t = state.timestep.to(self.device).view(1)
        return self.family.path.denoised(
            state.model_input(), state.mean(prediction), t if t.is_floating_point() else t.long()
        )

    @torch.inference_mode()
    def decode(self, outputs: Sequence[Output]) -> list[Tensor]:
        """Pictures [3, H, W] in [0, 1], fp32 on the CPU, in the order given."""
        codec = self.parts[self.family.codec] if self.family.codec else None
        dtype = next(codec.parameters()).dtype if codec is not None else torch.float32
        pictures: list[Tensor] = []
        for _, same in itertools.groupby(outputs, key=lambda item: item.alike):
            group = list(same)
            for chunk in torch.cat([item.latents for item in group]).split(DECODE_BATCH):
                with self._codec_lock, wearing(codec, group[0].codec):
                    pixels = self.family.decode(codec, chunk.to(dtype)).float()
                pictures += (pixels / 2 + 0.5).clamp(0, 1).cpu().unbind()
        edits = [item.edit for item in outputs]
        return [
            picture if edit is None else finish(picture, edit) for picture, edit in zip(pictures, edits, strict=True)
        ]

    def _batch(self) -> list[State]:
        groups: dict[Hashable, list[State]] = {}
        for state in self._states.values():
            groups.setdefault(state.key, []).append(state)
        if not groups:
            self._work.clear()
            return []
        least = min((self._work[key] for key in groups if key in self._work), default=0)
        self._work = {key: self._work.get(key, least) for key in groups}  # who comes anew has missed nothing
        key = min(groups, key=self._work.__getitem__)
        pixels = groups[key][0].request.height * groups[key][0].request.width
        most = self.max_batch if self.max_pixels is None else min(self.max_batch, max(1, self.max_pixels // pixels))
        batch = sorted(groups[key][:most], key=lambda state: state.seat[:2])  # rows of a slot in one matrix product
        self._work[key] += pixels * len(batch)
        return batch

    def _predict(self, batch: Sequence[State]) -> Tensor:
        """The model's outputs [B, C, h, w] in fp32; under guidance every state is some rows of the forward pass.

        Where batches have fixed sizes the last state fills up what is left, and B may be larger than the batch.
        """
        size = next((size for size in self._sizes if size >= len(batch)), len(batch))
        batch = [*batch, *[batch[-1]] * (size - len(batch))]
        rows = [row for state in batch for row in state.rows()]  # those of an adapter are one run
        each = len(rows) // len(batch)
        noisy, conditions = torch.cat([latents for latents, _ in rows]), [given for _, given in rows]
        t = torch.stack([state.timestep for state in batch]).repeat_interleave(each, 0)
        if self.residents is not None:
            self.residents.wear([state.seat for state in batch for _ in range(each)], self.family.main)
        inputs = noisy.to(self.dtype), t.to(self.device), self.family.collate(conditions)
        prediction = self.family.predict(self._main, *inputs).float()
        if each == 1:
            return prediction
        scale = self._scales([state.request.guidance for state in batch])
        if each == 2:
            return self.family.guide(prediction[0::2], prediction[1::2], scale)
        return self._guide_twice(prediction.unflatten(0, (-1, 3)), scale, [state.edit for state in batch])

    def _scales(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self.device).view(-1, 1, 1, 1)

    def _guide_twice(self, rows: Tensor, scale: Tensor, edits: Sequence[Edit | None]) -> Tensor:
        """Guidance by the prompt and by the image, each with a scale of its own (arXiv 2211.09800, equation 3); rows
        [B, 3, C, h, w] are without both, with the image, and with both."""
        blind, seeing, told = rows.unbind(1)
        more = self._scales([(edit.image_guidance or 1.0) - 1 for edit in edits if edit is not None])
        return self.family.guide(seeing, told, scale.clamp(min=1)) + more * (seeing - blind)

    def _encoded(self, prompt: str, seat: Seat) -> Conditions:
        # One by one, so that a prompt's embedding does not depend on its neighbours.
        key = seat.encoding, prompt
        if key not in self._prompts:
            encoders = {part: self.parts[part] for part in self.family.encoders}
            if self.residents is not None:
                for part in encoders:
                    self.residents.wear([seat], part)
            self._prompts[key] = self.family.encode_prompts(encoders, [prompt])[0]
            if len(self._prompts) > CACHED_PROMPTS:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(key)
        return self._prompts[key]

    def _negative(self, prompt: str, seat: Seat) -> Conditions:
        encoded = self._encoded(self.family.negative_text(prompt), seat)
        return encoded if prompt else self.family.unconditional(encoded)

    def _completed(self, conditions: Conditions, request: Request) -> Conditions:
        size = (request.height, request.width)
        sizes = self.family.size_conditions(Geometry(original=size, crop=(0, 0), target=size))
        guidance = self.family.guidance_conditions(request.guidance)
        return {name: value.to(self.device) for name, value in {**conditions, **sizes, **guidance}.items()}


def batch_sizes(most: int) -> tuple[int, ...]:
    """Powers of two below the most, and that."""
    return (*itertools.takewhile(lambda size: size < most, (2**i for i in itertools.count())), most)
