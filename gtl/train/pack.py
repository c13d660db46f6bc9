"""Several runs in one forward pass of one process, each with a slot, an optimizer and a lane of its own.

Fine-tuning with small batches leaves most of a large device idle; packing fills it (PLoRA, arXiv 2508.02932, does so
for language models). Runs of a pack share the base, which nobody moves, and differ in what is theirs alone: rank,
alpha, learning rate, schedule, seed and freeze depth. They join and leave between two steps.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from gtl import __version__
from gtl.adapters import Registry
from gtl.adapters.slots import Slots
from gtl.config import Recipe, parse_recipe
from gtl.config.tuners import LoraTuner
from gtl.data.dataset import Dataset
from gtl.families import denoising
from gtl.storage import Store
from gtl.train.assemble import Trainee, assemble
from gtl.train.course import Course, Images, images_of, make_loader
from gtl.train.job import Job, Notify
from gtl.train.loop import Tally
from gtl.train.place import place
from gtl.train.plan import TrainPlan
from gtl.train.slot_engine import SlotEngine
from gtl.train.worker import settle
from gtl.tuners.base import trained_parts
from gtl.tuners.lora import Lora
from gtl.types import Batch, Losses, UserError

if TYPE_CHECKING:
    from gtl.families.base import DiffusionFamily

TIMED = 2
"""Steps that are timed, after one that is not."""


@dataclass
class Hours:
    """A run's part of the device's time."""

    used: float = 0.0

    def __call__(self) -> float:
        """Device hours so far."""
        return self.used


@dataclass
class Member:
    """A run in a pack."""

    engine: SlotEngine
    course: Course
    steps: Iterator[tuple[int, Sequence[Batch]]]
    hours: Hours
    files: ExitStack
    """Closes what the course has open."""
    error: Exception | None = None
    """Why it left, other than at its end or because it was asked to."""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What goes wrong within it is the run's own affair."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error


class Pack:
    """A model with slots. One process, all of the model on one device; the process group stands already."""

    def __init__(self, job: Job, device: torch.device, places: int, rank: int) -> None:
        """Load the model of the first job; those that join have the same.

        Args:
            job: Of any run of the pack; see `check_base`.
            device: Where it computes.
            places: Runs at once.
            rank: The most that one of them has.

        Raises:
            UserError: the model is not what it has to be, or a layer cannot have slots.
        """
        self.members: list[Member] = []
        self._device, self._base, self._dtype = device, job.base, job.dtype
        self._rows: int | None = None
        """Of a pass at most, once more were too many for the device's memory."""
        recipe = parse_recipe(job.recipe)
        everywhere = recipe.tuner.model_copy(update={"freeze_depth": 0})
        self._trainee = assemble(recipe, job.dtype, adapted=False)
        self.family = denoising(self._trainee.family)
        ((self._name, self._player),) = self._trainee.players.items()
        parts = self._trainee.parts
        lora = lora_of(recipe.model_copy(update={"tuner": everywhere}), self.family)
        targets: dict[str, list[str]] = {}
        trained = {name: parts[name] for name in trained_parts(recipe.tuner.train, list(parts))}
        for part, target in lora.targets(trained):
            targets.setdefault(part, []).append(target)
        for module in trained.values():
            module.train()  # as it is where a run has it to itself
        place(self._player, self._trainee.dtype, device)
        self._stacks = [
            Slots(part, parts[part], names, places + 1, rank, trainable=True) for part, names in targets.items()
        ]
        self._outline = {part: self.family.load(part, device="meta") for part in parts}
        """The parts as they were, without their weights."""
        self._free = list(range(1, places + 1))
        self._datasets: dict[str, Dataset] = {}

    def join(self, job: Job, notify: Notify) -> Member:
        """Give a run a place, from where its newest checkpoint stands.

        Raises:
            UserError: versions or models differ, or the run cannot be what it says.
        """
        if job.code != __version__:
            raise UserError(f"gtl {__version__} in a pack, {job.code} where the run was started; install one version")
        if (job.base, job.dtype) != (self._base, self._dtype):
            raise UserError(f"{job.run.url()}: another model than that of the pack on {platform.node()}")
        recipe, hours, slot = parse_recipe(job.recipe), Hours(), self._free[0]
        engine, trainee, plan, images = self._seat(job, recipe, slot)
        try:
            course = Course(job, recipe, trainee, {self._name: engine}, plan, images, self._device, notify, hours)
            files = ExitStack()
            files.enter_context(course)
        except BaseException:
            engine.leave()
            raise
        self._free.remove(slot)
        member = Member(engine, course, course.lane.watch(course.batches), hours, files)
        self.members.append(member)
        self.members.sort(key=lambda member: member.engine.slot)  # their weights are read where they lie
        return member

    def _seat(self, job: Job, recipe: Recipe, slot: int) -> tuple[SlotEngine, Trainee, TrainPlan, Images]:
        """A run's first weights in a slot, the model as its own, how it goes through its steps, and its images."""
        if job.dataset not in self._datasets:
            self._datasets[job.dataset] = Dataset.load(Store(recipe.storage.cache), job.dataset)
        images = images_of(recipe, self._datasets[job.dataset])
        tuner, init = lora_of(recipe, self.family), recipe.tuner.init
        plan = settle(recipe, self.family, self._device, job.dtype, images.batches.steps_per_epoch)
        folder = None if init is None else Registry(recipe.storage.registry).fetch(init)
        initial = tuner.initial(self._outline, recipe.train.seed, folder)
        engine = SlotEngine(
            self._player, self._stacks, slot, tuner.config.scale, initial, recipe.train, total_steps=plan.steps,
            device=self._device,
        )  # fmt: skip
        return engine, replace(self._trainee, tuner=tuner), plan, images

    def step(self) -> list[Member]:
        """One optimizer step of every member; those that left: at their end, because they were asked to, or failed.

        Raises:
            torch.OutOfMemoryError: a single image is too much for the device.
        """
        begun, present, turns = time.perf_counter(), list(self.members), []
        for member in present:
            with member.alone():
                if (item := next(member.steps, None)) is not None:
                    turns.append((member, *item))
        tallies = self._gradients([(member.engine, batches) for member, _, batches in turns])
        stay = []
        for (member, step, _), tally in zip(turns, tallies, strict=True):
            lane = member.course.lane
            with member.alone():
                lane.agree(tally)
                member.engine.step()
                lane.note(tally, member.engine)
                if not lane.close(step + 1):
                    stay.append(member)
        spent = (time.perf_counter() - begun) / 3600
        for member in present:
            member.hours.used += spent / len(present)
        left = [member for member in present if member not in stay]
        for member in left:
            self._dismiss(member)
        return left

    def abandon(self, error: Exception) -> list[Member]:
        """Let all members leave, for what none of them did; the pack is of no more use."""
        left = list(self.members)
        for member in left:
            member.error = member.error or error
            self._dismiss(member)
        return left

    def _dismiss(self, member: Member) -> None:
        """Let a member save, write its result if it is at its end, and leave."""
        failed = member.error
        with member.alone(), member.files:
            if failed is not None:
                raise failed
            member.course.lane.finish()
        if member.error is None:
            with member.alone():
                member.course.finish()
        self.members.remove(member)
        self._free = sorted([*self._free, member.engine.slot])
        member.engine.leave()

    def _gradients(self, turns: Sequence[tuple[SlotEngine, Sequence[Batch]]]) -> list[Tally]:
        """Add up the gradients of a step of each; what each lost."""
        engines = [engine for engine, _ in turns]
        passes = list(zip(*(batches for _, batches in turns), strict=True))
        while True:
            tallies = [Tally("") for _ in turns]
            try:
                for batches in passes:
                    for group in alike(batches):
                        losses = self._pass([engines[i] for i in group], [batches[i] for i in group])
                        for i, mine in zip(group, losses, strict=True):
                            tallies[i].add(mine, batches[i])
                return tallies
            except torch.OutOfMemoryError:
                most = max(sum(len(batch.weight) for batch in batches) for batches in passes)
                rows = min(most, self._rows or most)
                if rows == 1:
                    raise
                self._rows = rows // 2
                for engine in engines:
                    engine.forget_gradient()
            torch.cuda.empty_cache()

    def _pass(self, engines: Sequence[SlotEngine], batches: Sequence[Batch]) -> list[Losses]:
        """Forward and backward of a micro-batch of each, at once or, where memory is short, in parts."""
        merged = merge(batches)
        owners = [engine for engine, batch in zip(engines, batches, strict=True) for _ in batch.weight]
        most = self._rows or len(owners)
        found: list[Losses] = []
        for first in range(0, len(owners), most):
            rows = slice(first, first + most)
            for slots in self._stacks:
                slots.assign([engine.slot for engine in owners[rows]], [engine.scale for engine in owners[rows]])
            tensors = {name: value[rows] for name, value in merged.tensors.items()}
            losses: Losses = self._player(Batch(tensors, merged.weight[:, rows]).to(self._device))
            losses.total.sum().backward()
            found.append(Losses(losses.total.detach(), losses.parts))
        totals = torch.stack([losses.total for losses in found]).sum(0)
        parts = {name: torch.stack([losses.parts[name] for losses in found]).sum(0) for name in found[0].parts}
        return [Losses(totals[i], {name: value[i] for name, value in parts.items()}) for i in range(len(engines))]

    def seconds(self, job: Job, counts: Sequence[int]) -> dict[int, float]:
        """What a step of so many runs like this one takes at once, in seconds, looks and data apart; an empty pack's.

        Counts that do not fit into memory are left out.
        """
        recipe, taken = parse_recipe(job.recipe), {}
        seats = [self._seat(job, recipe, slot) for slot in self._free[: max(counts)]]
        _, trainee, plan, images = seats[0]
        loader = make_loader(images.trained, images.batches, trainee, plan, recipe.data.seed, 0, self._device)
        micro_batches = loader.batches(0)
        for count in counts:
            engines = [seat[0] for seat in seats[:count]]
            try:
                taken[count] = min(self._timed(engines, micro_batches) for _ in range(1 + TIMED))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
        for engine, *_ in seats:
            engine.leave()
        return taken

    def _timed(self, engines: Sequence[SlotEngine], micro_batches: Sequence[Batch]) -> float:
        begun = time.perf_counter()
        for batch in micro_batches:
            self._pass(engines, [batch] * len(engines))
        for engine in engines:
            engine.step()
        return time.perf_counter() - begun


def lora_of(recipe: Recipe, family: DiffusionFamily) -> Lora:
    """A run's tuner."""
    assert isinstance(recipe.tuner, LoraTuner)  # others are kept out by `gtl.config.trials.unpacked`
    return Lora(recipe.tuner, family)


def alike(batches: Sequence[Batch]) -> list[list[int]]:
    """Positions of the batches that can be one: samples of a size and conditions of a length."""
    groups: dict[Any, list[int]] = {}
    for position, batch in enumerate(batches):
        kind = tuple(sorted((name, value.shape[1:], value.dtype) for name, value in batch.tensors.items()))
        groups.setdefault(kind, []).append(position)
    return list(groups.values())


def merge(batches: Sequence[Batch]) -> Batch:
    """One batch of several runs', whose weight is [runs, B]."""
    tensors = {name: torch.cat([batch.tensors[name] for batch in batches]) for name in batches[0].tensors}
    return Batch(tensors, torch.block_diag(*(batch.weight for batch in batches)))
