"""The adapters that live in a model while it draws for many.

On the device they are in slots, of which every row of a batch takes its own: see `gtl.adapters.slots`. What cannot be
in a slot is a set of whole weights, put in place of the base's for batches of its own, and of words, which the encoders
know as long. All are kept in host memory within a bound, the longest unused going first, so that what is in demand is
read from its files once.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from gtl.adapters.apply import WORDY, apply, kind_of
from gtl.adapters.channels import adds_channels
from gtl.adapters.formats import MAIN_PARTS
from gtl.adapters.merge import merge
from gtl.adapters.sharing import fits
from gtl.adapters.slots import Slots, Stack, joint
from gtl.adapters.words import Word, read_word
from gtl.families.wide import joined, wide_layers
from gtl.families.word_table import add_word, remove_words, table_of
from gtl.types import UserError

Adapters = tuple[tuple[Path, float], ...]
"""Folders of published adapters with their scales, all active at once; () is the base alone."""
HOST_BYTES = 4 << 30
_MERGING = threading.Lock()
"""PEFT makes its layers on the meta device by changing what all threads' modules do meanwhile."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """Adapters in host memory, ready for the device."""

    key: Adapters
    """A single one's scale is 1 here: its rows bring theirs."""
    stacks: Mapping[str, Stack]
    """What goes into a slot, by part; empty if it needs a pass of its own."""
    weights: Mapping[str, Tensor]
    """Whole weights by `<part>.<parameter>`, for a pass of its own."""
    reason: str | None
    """Why it needs one; None: it shares passes."""
    words: tuple[Word, ...] = ()
    """What the encoders know during a pass of its own."""
    edits: bool = False
    """Whether the model sees an image that is to be edited in it."""

    @property
    def encodes(self) -> bool:
        """Whether prompts are encoded in another way with them."""
        names = (*self.stacks, *self.weights)
        return bool(self.words) or any(name.partition(".")[0] not in MAIN_PARTS for name in names)

    def own(self, part: str | None) -> dict[str, Tensor]:
        """Of the whole weights those of a part, by its own names."""
        return own_of(self.weights, part)

    @property
    def bytes(self) -> int:
        """Of host memory."""
        tensors = [*(stack.values for stack in self.stacks.values()), *self.weights.values()]
        tensors += [tensor for word in self.words for tensor in word.vectors.values()]
        return sum(tensor.nbytes for tensor in tensors)


class Seat(NamedTuple):
    """What a request's rows take while it is drawn."""

    slot: int = 0
    scale: float = 1.0
    company: Adapters = ()
    """Only seats of one company share a batch: () for all that are in slots, else those in its whole weights."""
    encoding: Adapters = ()
    """Those that change how prompts are encoded; () if none does."""
    was_there: bool = True
    """Whether it was on the device already."""
    edits: bool = False
    """Whether the model sees an image that is to be edited."""


BASE = Seat()


class Residents:
    """Adapters on a model's parts: read anywhere, seated and worn by the one thread that draws."""

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        targets: Mapping[str, Sequence[str]],
        slots: int,
        rank: int,
        *,
        host_bytes: int = HOST_BYTES,
        max_alone: int = 1,
        steady: bool = False,
    ) -> None:
        """Give the parts' layers slots, in place.

        Args:
            parts: Frozen, on the device: the main part, the encoders and the codec.
            targets: Names of each part's layers that get slots. A part without an entry here is never worn, since it
                does not run in the passes that rows are worn for: see `own`.
            slots: How many at once, with slot 0, which is the base.
            rank: The most that a slot holds in a layer.
            host_bytes: Of adapters in host memory.
            max_alone: Sets of whole weights on the device at once.
            steady: See `Slots`.

        Raises:
            UserError: a target is no layer that can have slots.
        """
        self._parts = parts
        self._live = {f"{part}.{name}": value for part in parts for name, value in parts[part].named_parameters()}
        self._plain = {part: shadow(module) for part, module in parts.items()}
        self._stacks = {
            part: Slots(part, parts[part], names, slots, rank, steady=steady) for part, names in targets.items()
        }
        self._host_bytes, self._max_alone = host_bytes, max_alone
        self._lock = threading.Lock()
        self._host: OrderedDict[tuple[Adapters, bool], Loaded] = OrderedDict()
        """By what they are, and whether they need a pass of their own."""
        self._slots: OrderedDict[int, Adapters | None] = OrderedDict.fromkeys(range(1, slots))
        """Slot -> what is in it; those that were used last are last."""
        self._users = [0] * slots
        self._alone: dict[Adapters, tuple[int, dict[str, Tensor], tuple[Word, ...]]] = {}
        """Requests that are seated with whole weights and words, and those, the weights on the device."""
        self._worn: Adapters = ()
        self._swapped: dict[str, Tensor] = {}
        self._known: tuple[Word, ...] = ()

    def read(self, adapters: Adapters, *, alone: bool = False) -> Loaded:
        """Bring adapters into host memory; from any thread.

        Args:
            adapters: What is wanted at once.
            alone: Merge them into whole weights though they could share a pass, which is faster for all rows of one.

        Raises:
            UserError: one is damaged, or does not fit the model.
        """
        names = [(adapters, True)] if alone else [(unscaled(adapters), False), (adapters, True)]
        with self._lock:
            if (name := next((name for name in names if name in self._host), None)) is not None:
                self._host.move_to_end(name)
                return self._host[name]
        loaded = self._load(adapters, alone)
        with self._lock:
            self._host[loaded.key, loaded.reason is not None] = loaded
            while len(self._host) > 1 and sum(one.bytes for one in self._host.values()) > self._host_bytes:
                self._host.popitem(last=False)
        return loaded

    def _load(self, adapters: Adapters, alone: bool) -> Loaded:
        reason: str | None = "it is merged into the weights"
        if not alone:
            reason = next((why for folder, _ in adapters if (why := fits(folder)) is not None), None)
        if reason is None:
            key = unscaled(adapters)
            tensors = joint(self._plain, key)
            try:
                return Loaded(key, self._stack(tensors, key), {}, None)
            except UserError as error:  # layers or ranks that the slots have not
                reason = str(error)
        kinds = [kind_of(folder) for folder, _ in adapters]
        words = tuple(adapter for adapter, kind in zip(adapters, kinds, strict=True) if kind in WORDY)
        others = tuple(adapter for adapter, kind in zip(adapters, kinds, strict=True) if kind != "prompt")
        with _MERGING:
            edits = any(adds_channels(folder) for folder, _ in adapters)
            return Loaded(adapters, {}, self._merge(others), reason, self._words(words), edits)

    def _words(self, adapters: Adapters) -> tuple[Word, ...]:
        """The words in adapters, after a try whether the encoders take all of them."""
        fresh = {part: shadow(module) for part, module in self._plain.items()} if adapters else {}
        for number, (folder, scale) in enumerate(adapters):
            apply(fresh, folder, f"adapter{number}", scale)
        return tuple(read_word(folder) for folder, _ in adapters)

    def _merge(self, adapters: Adapters) -> dict[str, Tensor]:
        """The weights that adapters change, with all of them in."""
        fresh = {part: shadow(module) for part, module in self._plain.items()}
        changed = merge(fresh, adapters, beside_words=True)
        weights = {}
        for name in sorted(changed):
            part, _, parameter = name.partition(".")
            weights[name] = fresh[part].get_parameter(parameter).data.to("cpu", self._live[name].dtype)
        for part, module in fresh.items():
            for layer, wide in wide_layers(module):  # a convolution reads as many channels as its weight has
                name = f"{part}.{layer}.weight"
                weights[name] = joined(wide).to("cpu", self._live[name].dtype)
        return weights

    def _stack(self, tensors: Mapping[str, Tensor], adapters: Adapters) -> dict[str, Stack]:
        where = " + ".join(str(folder) for folder, _ in adapters)
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            groups.setdefault(name.partition(".")[0], {})[name] = tensor
        if missing := groups.keys() - self._stacks.keys():
            raise UserError(f"{where}: {', '.join(sorted(missing))} has no slots here")
        return {part: self._stacks[part].stack(group, where) for part, group in groups.items()}

    def seat(self, adapters: Adapters, loaded: Loaded) -> Seat | None:
        """A place on the device for one more request, until it leaves; None while all are in use."""
        if loaded.reason is not None:
            return self._seat_alone(adapters, loaded)
        slot = next((slot for slot, key in self._slots.items() if key == loaded.key), None)
        was_there = slot is not None
        if slot is None:
            slot = next((slot for slot in self._slots if not self._users[slot]), None)
            if slot is None:
                return None
            self._slots[slot] = loaded.key
            for part, slots in self._stacks.items():
                if part in loaded.stacks:
                    slots.put(slot, loaded.stacks[part])
                else:
                    slots.evict(slot)
        self._slots.move_to_end(slot)
        self._users[slot] += 1
        scale = adapters[0][1] if len(adapters) == 1 else 1.0
        return Seat(slot, scale, (), adapters if loaded.encodes else (), was_there)

    def _seat_alone(self, adapters: Adapters, loaded: Loaded) -> Seat | None:
        users, weights, _ = self._alone.get(loaded.key, (0, {}, ()))
        if not users:
            if len(self._alone) == self._max_alone:
                return None
            weights = {name: value.to(self._live[name].device) for name, value in loaded.weights.items()}
        self._alone[loaded.key] = users + 1, weights, loaded.words
        return Seat(0, 1.0, loaded.key, adapters if loaded.encodes else (), users > 0, loaded.edits)

    def leave(self, seat: Seat) -> None:
        """A request is through. What it took stays until its place is needed; whole weights leave with their last."""
        if not seat.company:
            if seat.slot:
                self._users[seat.slot] -= 1
            return
        users, weights, words = self._alone.pop(seat.company)
        if users > 1:
            self._alone[seat.company] = users - 1, weights, words
        elif self._worn == seat.company:
            self._swap(())

    def wear(self, seats: Sequence[Seat], part: str) -> None:
        """Let the rows of a part's next batch take what is seated; all are of one company."""
        if self._worn != seats[0].company:
            self._swap(seats[0].company)
        if (slots := self._stacks.get(part)) is not None:
            slots.assign([seat.slot for seat in seats], [seat.scale for seat in seats])

    def _swap(self, company: Adapters) -> None:
        """Let whole weights and what they replace change places, and words come and go; (): the base's own."""
        for name, value in self._swapped.items():
            self._live[name].data = value
        for word in self._known:
            for part in word.vectors:
                remove_words(self._parts[part])
        _, weights, self._known = self._alone[company] if company else (0, {}, ())
        for word in self._known:
            for part, vectors in word.vectors.items():
                table = table_of(self._parts[part]).weight
                add_word(self._parts[part], word.token, vectors.to(table.device, table.dtype))
        weights = {name: value for name, value in weights.items() if name.partition(".")[0] in self._stacks}
        self._swapped = {name: self._live[name].data for name in weights}
        for name, value in weights.items():
            self._live[name].data = value
        self._worn = company

    def own(self, seat: Seat, part: str | None) -> dict[str, Tensor]:
        """Whole weights of a part that a seat brings, on the device, by the part's own names."""
        _, weights, _ = self._alone.get(seat.company, (0, {}, ()))
        return own_of(weights, part)

    def resident(self) -> tuple[Adapters, ...]:
        """What is in slots, that which was used last first."""
        return tuple(key for key in reversed(self._slots.values()) if key is not None)


def own_of(weights: Mapping[str, Tensor], part: str | None) -> dict[str, Tensor]:
    """Those of `<part>.<parameter>` that are of this part."""
    return {name.partition(".")[2]: value for name, value in weights.items() if name.partition(".")[0] == part}


def unscaled(adapters: Adapters) -> Adapters:
    """What a slot holds of adapters: of a single one its rows bring the scale."""
    return ((adapters[0][0], 1.0),) if len(adapters) == 1 else adapters


def shadow(module: nn.Module) -> nn.Module:
    """A module of its own whose parameters and buffers lie in another's memory."""
    memo: dict[int, object] = {
        id(value): nn.Parameter(value.data, requires_grad=False) for value in module.parameters()
    }
    memo |= {id(value): value for value in module.buffers()}
    twin: nn.Module = copy.deepcopy(module, memo)
    return twin
