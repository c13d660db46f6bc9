"""The training loop, which knows neither Ray nor DeepSpeed, and the lane that clocks, reports and saves a run."""

from __future__ import annotations

import math
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.distributed as dist

from gtl.types import Batch, Losses, UserError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from types import FrameType

    from torch import Tensor

    from gtl.train.checkpoint import Shapes, State


Wish = Literal["save", "stop"]
"""What somebody outside asks of a run: to save and go on, or to save and stop."""


class DivergedError(UserError):
    """The loss or its gradient is no longer a finite number; every rank raises it at the same step."""


class Stepper(Protocol):
    """What the lane asks of an engine that made a step."""

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's whole gradient, before clipping; the same on every rank."""
        ...

    @property
    def learning_rate(self) -> float:
        """Rate of the last step."""
        ...

    def take_flops(self) -> float:
        """Floating-point operations on this rank since the last call; 0 where they are not counted."""
        ...


class Player(Stepper, Protocol):
    """What the loop asks of an engine."""

    def __call__(self, batch: Batch) -> Losses | None:
        """The batch's losses, or None when the player sits the step out."""
        ...

    def backward(self, total: Tensor) -> None:
        """Add a micro-batch's gradient."""
        ...

    def step(self) -> None:
        """Make the optimizer step."""
        ...


class Learner(Protocol):
    """What looks, checkpoints and the export ask of an engine."""

    @property
    def shapes(self) -> Shapes:
        """Of every trained parameter, by name."""
        ...

    def __call__(self, batch: Batch) -> Losses | None:
        """Run the player forward."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """Within it the player is in evaluation mode, without gradients, and has its averaged weights. Collective."""
        ...

    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        """Whole trained weights by name, fp32 in CPU memory, on rank 0; {} elsewhere. Collective."""
        ...

    def state(self) -> State:
        """Everything that the next step depends on; its tensors on rank 0 only. Collective."""
        ...

    def load_state(self, steps: int, tensors: Iterable[tuple[str, Mapping[str, Tensor]]]) -> None:
        """Go on from a state."""
        ...


class Look(Protocol):
    """What the lane asks about how good the model is after a step; the answers are the same on every rank."""

    def __call__(self, done: int) -> Mapping[str, float]:
        """Further metrics of the row after that many steps; mostly none. Collective."""
        ...

    @property
    def enough(self) -> bool:
        """Whether more steps would not make it better."""
        ...


class NoLook:
    """Looks at nothing."""

    enough = False

    def __call__(self, done: int) -> Mapping[str, float]:
        """None."""
        return {}


def train(players: Mapping[str, Player], batches: Iterable[tuple[int, Sequence[Batch]]], lane: Lane) -> int:
    """Train to the end of the batches, until the lane is asked to stop or has seen enough; the steps made in all.

    Args:
        players: Engines by name, in the order of their turns.
        batches: (step, this rank's micro-batches), steps counted from 0 since the run began.
        lane: The run's clock, report and save.

    Raises:
        DivergedError: a loss or gradient is not finite. No save holds it.
    """
    for step, micro_batches in lane.watch(batches):
        for name, player in players.items():
            tally = Tally(f"{name}_" if len(players) > 1 else "")
            for batch in micro_batches:
                losses = player(batch)
                if losses is not None:
                    player.backward(losses.total)
                    tally.add(losses, batch)
            if tally.shares:
                lane.agree(tally)
                player.step()
                lane.note(tally, player)
        if lane.close(step + 1):
            break
    lane.finish()
    return lane.done


class Tally:
    """Sums of what one player reported for the micro-batches of a step, on this rank."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        """In front of the metrics' names, when there are several players."""
        self.shares: dict[str, Tensor] = {}
        self.images: Tensor | int = 0

    def add(self, losses: Losses, batch: Batch) -> None:
        """Take in one micro-batch."""
        for name, value in {"loss": losses.total, **losses.parts}.items():
            self.shares[name] = self.shares.get(name, 0.0) + value.detach()
        self.images = self.images + batch.weight.count_nonzero()  # fillers have no weight


@dataclass
class Lane:
    """Clock, report and save of one run."""

    seed: int
    """Of whatever draws from torch's global generator, such as dropout."""
    save_every: int
    """Most steps between two saves; the last step is saved too."""
    save: Callable[[int], None]
    """Saves the state after that many steps. Called on every rank at the same step."""
    report: Callable[[dict[str, float]], Wish | None]
    """Takes a row of metrics, on rank 0; returns what somebody asks of the run, if anything."""
    look: Look = field(default_factory=NoLook)
    """Measures the model; asked after every step, and before the first."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where the process group reduces tensors."""
    peak_flops: float | None = None
    """Operations a second that this rank's device can do at most, if known."""
    done: int = 0
    """Optimizer steps made; set when a run is resumed."""
    save_looks: bool = False
    """Whether the state of every look is saved, too, for others to go on from."""

    def __post_init__(self) -> None:
        self._saved = self.done
        self._asked_stop = self._asked_save = False
        self._agreed_stop = self._agreed_save = False
        self._row: dict[str, float] = {}
        self._begun = self._waited = self._flops = 0.0

    def request_stop(self) -> None:
        """Save and stop after the current step or the next, on all ranks together. For any rank, thread or handler."""
        self._asked_stop = True

    def request_save(self) -> None:
        """Save after the current step or the next, on all ranks together. For any rank, thread or handler."""
        self._asked_save = True

    def watch(self, batches: Iterable[tuple[int, Sequence[Batch]]]) -> Iterator[tuple[int, Sequence[Batch]]]:
        """The same batches, each with its clock started and the global generator seeded for its step."""
        if self.done == 0 and (seen := self.look(0)):
            self._tell({"step": 0.0, **seen})
        iterator = iter(batches)
        while not self.look.enough:
            self._begun = time.perf_counter()
            item = next(iterator, None)
            if item is None:
                return
            self._waited = time.perf_counter() - self._begun
            seed_step(self.seed, item[0])
            yield item

    def agree(self, tally: Tally) -> None:
        """Sum a player's losses over ranks, and with them the wishes to stop and to save. Collective.

        Raises:
            DivergedError: the loss is not finite on some rank; on all ranks alike, before the optimizer steps.
        """
        asks_save, self._asked_save = self._asked_save, False
        own = torch.stack([share.to(self.device, torch.float64) for share in tally.shares.values()])
        counts = torch.tensor([float(tally.images), self._asked_stop, asks_save], dtype=torch.float64)
        # One copy that nobody waits for: the sum is queued behind the backward pass, and only its result is waited for.
        vector = torch.cat([own, counts.to(self.device, non_blocking=True)])
        dist.all_reduce(vector)
        *shares, images, stop, save = vector.tolist()
        self._agreed_stop |= stop > 0
        self._agreed_save |= save > 0
        self._row["images"] = images
        for name, share in zip(tally.shares, shares, strict=True):
            self._row[tally.prefix + name] = share
        if not math.isfinite(shares[0]):
            raise self._diverged(f"{tally.prefix}loss", shares[0])

    def note(self, tally: Tally, player: Stepper) -> None:
        """Take in what a player's step was.

        Raises:
            DivergedError: the gradient is not finite; on all ranks alike.
        """
        if not math.isfinite(player.grad_norm):
            raise self._diverged(f"{tally.prefix}grad_norm", player.grad_norm)
        self._flops += player.take_flops()
        self._row[f"{tally.prefix}grad_norm"] = player.grad_norm
        self._row[f"{tally.prefix}learning_rate"] = player.learning_rate

    def close(self, done: int) -> bool:
        """End a step: report, save if it is due; whether the run is to stop, the same on all ranks."""
        seconds = time.perf_counter() - self._begun
        images = self._row.pop("images", 0.0)
        self.done = done
        row = {
            "step": float(done),
            **self._row,
            "images_per_second": images / seconds,
            "step_seconds": seconds,
            "data_wait": self._waited / seconds,
            "peak_memory_bytes": peak_memory(self.device),
            **utilisation(self._flops / seconds, self.peak_flops),
        }
        self._row, self._flops = {}, 0.0
        seen = self.look(done)
        self._tell({**row, **seen})
        if self._agreed_save or done - self._saved >= self.save_every or (self.save_looks and seen):
            self._save_now()
        return self._agreed_stop

    def _tell(self, row: dict[str, float]) -> None:
        if dist.get_rank() != 0:
            return
        wish = self.report(row)
        if wish == "stop":
            self.request_stop()
        elif wish == "save":
            self.request_save()

    def finish(self) -> None:
        """Save what was done since the last save."""
        if self._saved != self.done:
            self._save_now()

    def _save_now(self) -> None:
        self._agreed_save = self._asked_save = False  # whoever asked behind this step has it, too
        self.save(self.done)
        self._saved = self.done

    def _diverged(self, what: str, value: float) -> DivergedError:
        kept = f"the checkpoint of step {self._saved} stands" if self._saved else "nothing had been saved"
        return DivergedError(
            f"train.learning_rate: {what} is {value} at step {self.done + 1}; {kept}; "
            "try a lower rate, a longer train.schedule.warmup or model.dtype=fp32"
        )


@contextmanager
def stop_on_signals(lane: Lane) -> Iterator[None]:
    """Let the first SIGTERM or SIGINT ask the lane to save and stop; a second one acts as it did before.

    Outside the main thread, where Python has no signal handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        lane.request_stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        restore()


def seed_step(seed: int, step: int) -> None:
    """Seed torch's global generators from (seed, step, rank), so that a resumed run draws what a straight one does."""
    drawn = random.Random(f"{seed} {step} {dist.get_rank()}").getrandbits(63)
    # torch.manual_seed would record a stack trace for every kind of device that is not there, for a millisecond.
    torch.default_generator.manual_seed(drawn)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(drawn)


def utilisation(flops: float, peak: float | None) -> dict[str, float]:
    """Metrics of so many floating-point operations a second on one device; none where they are not counted."""
    if not flops:
        return {}
    return {"tflops": flops / 1e12, **({"mfu": flops / peak} if peak else {})}


def peak_memory(device: torch.device) -> float:
    """Bytes this process held at most: on the GPU, or resident where there is none."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
