"""One run of a pack: its slot's weights, with an optimizer, clipping, a schedule and an average of their own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gtl.adapters.slots import Slots
from gtl.config.recipe import Train
from gtl.train.checkpoint import Shapes, State
from gtl.train.engine import in_evaluation
from gtl.train.optimizer import MOMENTS, make_optimizer, read_moments, write_moments
from gtl.train.schedule import ema_decay, learning_rate
from gtl.types import Batch, Losses


class SlotEngine:
    """What `gtl.train.engine.Engine` is to a run that has a model to itself; states are the same."""

    def __init__(
        self, player: nn.Module, stacks: Sequence[Slots], slot: int, scale: float, initial: Mapping[str, Tensor],
        train: Train, *, total_steps: int, device: torch.device,
    ) -> None:  # fmt: skip
        """Put a run's first weights into a slot.

        Args:
            player: Shared with other runs.
            stacks: The slots of every part that is trained.
            slot: The run's, in all of them.
            scale: Of its updates.
            initial: What it starts from, by the names that checkpoints use.
            train: The recipe's section.
            total_steps: Length of the run, for the learning rate.
            device: Where the player is.
        """
        self.slot, self.scale = slot, scale
        self.steps = 0
        self.grad_norm = math.nan
        self.learning_rate = math.nan
        self.shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in initial.items()}
        self._player, self._stacks, self._train, self._device = player, stacks, train, device
        self._total_steps = total_steps
        for slots, tensors in self._split(initial):
            slots.put(slot, slots.stack(tensors))
        self._parameters: list[Tensor] = [slots.parameter(slot) for slots in stacks]
        self._optimizer = make_optimizer([slots.parameter(slot) for slots in stacks], train)
        self._ema = [parameter.detach().clone() for parameter in self._parameters] if train.ema else []

    def __call__(self, batch: Batch) -> Losses | None:
        """Run the player forward; within `evaluating`."""
        losses: Losses | None = self._player(batch.to(self._device))
        return losses

    def take_flops(self) -> float:
        """0: a pass is of several runs, and is not counted."""
        return 0.0

    def step(self) -> None:
        """Make the optimizer step. Skipped when the gradient isn't finite."""
        train = self._train
        self.learning_rate = learning_rate(train.schedule, train.learning_rate, self.steps, self._total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.grad_norm = float(nn.utils.clip_grad_norm_(self._parameters, train.max_grad_norm or math.inf))
        is_finite = math.isfinite(self.grad_norm)
        if is_finite:
            self._optimizer.step()
        self.forget_gradient()
        self.steps += 1
        if self._ema and is_finite:
            with torch.no_grad():
                torch._foreach_lerp_(self._ema, self._parameters, 1.0 - ema_decay(train.ema or 0.0, self.steps))

    def forget_gradient(self) -> None:
        """Start to add up anew."""
        for parameter in self._parameters:
            assert parameter.grad is not None
            parameter.grad.zero_()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it the player is this run's, in evaluation mode, without gradients, and has its averaged weights."""
        for slots in self._stacks:
            slots.assign_all(self.slot, self.scale)
        with in_evaluation(self._player), self._averaged():
            yield

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        if not self._ema:
            yield
            return
        kept = [parameter.detach().clone() for parameter in self._parameters]
        torch._foreach_copy_(self._parameters, self._ema)
        try:
            yield
        finally:
            torch._foreach_copy_(self._parameters, kept)

    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        """Trained weights by name, fp32 in CPU memory."""
        return self._named(self._ema if ema else self._parameters)

    def state(self) -> State:
        """Everything that the next step depends on."""
        moments = [read_moments(self._optimizer, parameter) for parameter in self._parameters]
        values: dict[str, Sequence[Tensor]] = {"weight": self._parameters}
        for number, kind in enumerate(MOMENTS):
            values[kind] = [pair[number] for pair in moments]
        if self._ema:
            values["ema"] = self._ema
        tensors: dict[str, dict[str, Tensor]] = {name: {} for name in self.shapes}
        for kind, rows in values.items():
            for name, tensor in self._named(rows).items():
                tensors[name][kind] = tensor
        return State(self.steps, tensors)

    def load_state(self, steps: int, tensors: Iterable[tuple[str, Mapping[str, Tensor]]]) -> None:
        """Go on from a state, also of a run that had a model to itself; one without EMA starts it at its weights."""
        kinds: dict[str, dict[str, Tensor]] = {kind: {} for kind in ("weight", *MOMENTS, "ema")}
        for name, values in tensors:
            for kind, found in kinds.items():
                found[name] = values["weight"] if kind == "ema" and "ema" not in values else values[kind]
        assert kinds["weight"].keys() == self.shapes.keys()
        rows: dict[str, list[Tensor]] = {
            kind: [slots.stack(mine).values.to(self._device) for slots, mine in self._split(found)]
            for kind, found in kinds.items()
        }
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, rows["weight"])
            if self._ema:
                torch._foreach_copy_(self._ema, rows["ema"])
        for parameter, *moments in zip(self._parameters, *(rows[kind] for kind in MOMENTS), strict=True):
            write_moments(self._optimizer, parameter, moments, steps)
        self.steps = steps

    def leave(self) -> None:
        """Make the slot empty."""
        for slots in self._stacks:
            slots.evict(self.slot)

    def _split(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Slots, dict[str, Tensor]]]:
        """Named tensors by the slots of their parts."""
        for slots in self._stacks:
            prefix = f"{slots.part}."
            yield slots, {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    def _named(self, rows: Sequence[Tensor]) -> dict[str, Tensor]:
        """Copies of what rows, one of each part, hold, in CPU memory."""
        named: dict[str, Tensor] = {}
        for slots, row in zip(self._stacks, rows, strict=True):
            named |= {name: tensor.cpu() for name, tensor in slots.named(self.slot, row.detach()).items()}
        return named
