"""Many LoRAs in one forward pass: every row of a batch takes the adapter in its slot, or none.

Serving mixes requests this way and a study its trials. The update is PEFT's (Hu et al. 2021, arXiv 2106.09685); that
rows may take different ones is as in Punica (Chen et al. 2023, arXiv 2310.18547), with plain batched products: an image
has so many tokens that they need no kernel of their own. Several adapters in one slot are one of their joint rank:
s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from gtl.adapters.apply import fitting_lora
from gtl.adapters.combine import concatenate, factors
from gtl.adapters.formats import A, B, layers_of
from gtl.adapters.sharing import fits
from gtl.adapters.slot_layers import Rows, SlotConv, SlotLayer, SlotLinear, Way, way_of
from gtl.types import UserError

ALIGNMENT = 64
"""Elements, to which every matrix begins: kernels read whole cache lines."""


class Stack(NamedTuple):
    """What goes into a slot."""

    values: Tensor
    """[width], see `Slots.weights`; on the CPU, pinned if the slots are on a GPU."""
    ranks: Mapping[str, int]
    """Layer `<part>.<module>` -> rank, of those with an update."""


class Place(NamedTuple):
    """Where a layer's matrices are in a slot."""

    layer: SlotLayer
    a: int
    """Where A [rank, in, ...] begins, as does B [rank, out] next."""
    b: int


class Slots:
    """Stacked LoRAs over the frozen layers of one part of a model; slot 0 is the base alone.

    All of a slot lies in one row of `weights`, and of `grads` where it is trained. So to load or evict is one copy, and
    an optimizer, its clipping and its moments see one flat parameter a slot. These two tensors never move.
    """

    def __init__(
        self,
        part: str,
        module: nn.Module,
        targets: Sequence[str],
        slots: int,
        rank: int,
        *,
        trainable: bool = False,
        steady: bool = False,
    ) -> None:
        """Wrap a part's layers, in place. It is frozen and where it is to run.

        Args:
            part: Its name: unet or transformer.
            module: The part.
            targets: Names of its linear and convolution layers, as `Family.lora_targets` gives them.
            slots: How many, with slot 0.
            rank: The most that a slot holds in a layer.
            trainable: Whether gradients are kept. Adapters are then fp32, otherwise of the base's dtype.
            steady: Compute every batch of a size alike, so that one compiled graph serves whatever is assigned. Layers
                that no row needs, padding and scales of 1 are computed too.

        Raises:
            UserError: a target is no layer that can have slots.
        """
        self.part, self.module = part, module
        self.slots, self.rank, self.steady = slots, rank, steady
        self.rows = Rows(trained=trainable)
        self._places: dict[str, Place] = {}
        width = 0
        for name in targets:
            layer = slot_layer(f"{part}.{name}", module.get_submodule(name), self.rows)
            a = width
            b = a + aligned(rank * math.prod(layer.weight.shape[1:]))
            width = b + aligned(rank * layer.weight.shape[0])
            self._places[layer.name] = Place(layer, a, b)
        for name, place in zip(targets, self._places.values(), strict=True):
            module.set_submodule(name, place.layer)
        like = next(iter(self._places.values())).layer.weight
        self._precise = torch.promote_types(like.dtype, torch.float32)
        dtype = self._precise if trainable else like.dtype
        self.weights = torch.zeros(slots, width, dtype=dtype, device=like.device)
        """[slots, width]: of every layer in order A [rank, in, ...] and B, transposed to [rank, out]."""
        self.grads = torch.zeros_like(self.weights) if trainable else None
        """[slots, width]: what backward passes add up, until it is set to zero."""
        # Said of a layer's gradients, which lie apart, slot by slot. Optimizers read them by whole slots, without gaps.
        warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")
        self._ranks: list[Mapping[str, int]] = [{} for _ in range(slots)]
        self._parameters: dict[int, nn.Parameter] = {}
        self._runs: dict[int, tuple[Tensor, Tensor]] = {}
        self._seen: tuple[int, int, frozenset[int]] | None = None

    def assign(self, slots: Sequence[int], scales: Sequence[float] | None = None) -> None:
        """Say which slot every row of the next batches takes, and at which scale (1 is what was trained).

        Under classifier-free guidance the batch has two rows a sample. Backward passes read it too: it stands until
        they are through.
        """
        if not slots or not all(0 <= slot < self.slots for slot in slots):
            raise ValueError(f"slots {list(slots)}: expected at least one, each from 0 to {self.slots - 1}")
        given = [1.0] * len(slots) if scales is None else list(scales)
        way = Way(1, None) if self.steady else way_of(slots, given)
        self._assign(way, slots[:: way.each], given[:: way.each])

    def assign_all(self, slot: int, scale: float = 1.0) -> None:
        """Let every row of the next batches, however many they have, take one slot."""
        self._assign(Way(None, slot), [slot], [scale])

    def _assign(self, way: Way, heads: Sequence[int], scale: Sequence[float]) -> None:
        """Slots and scales of the runs."""
        runs = len(heads)
        if runs not in self._runs:  # their memory stays, so that captured graphs read what is assigned
            with torch.inference_mode(False):  # or nobody could change them outside of it
                self._runs[runs] = (
                    torch.zeros(runs, dtype=torch.long, device=self.weights.device),
                    torch.ones(runs, dtype=self._precise, device=self.weights.device),
                )
        index, factors = self._runs[runs]
        index.copy_(torch.tensor(list(heads)), non_blocking=True)
        factors.copy_(torch.tensor(list(scale), dtype=factors.dtype), non_blocking=True)
        self.rows.each, self.rows.index, self.rows.gathered = way.each, index, way.first is None
        self.rows.scale = factors if self.steady or any(factor != 1 for factor in scale) else None
        first, count = (0, self.slots) if way.first is None else (way.first, runs)
        seen = first, count, frozenset(range(self.slots) if self.steady else heads)
        if seen != self._seen:
            self._show(*seen)
            self._seen = seen
        for slot, parameter in self._parameters.items():  # an optimizer's zero_grad takes it away
            parameter.grad = cast(Tensor, self.grads)[slot]

    def _show(self, first: int, count: int, used: frozenset[int]) -> None:
        """Let layers see consecutive slots, as wide as those in use are there."""
        for name, place in self._places.items():
            rank = self.rank if self.steady else max(self._ranks[slot].get(name, 0) for slot in used)
            views = [matrix[first : first + count, :rank] for matrix in self._matrices(place, self.weights)]
            if self.grads is not None:
                views = [view.detach().requires_grad_() for view in views]
                for view, grad in zip(views, self._matrices(place, self.grads), strict=True):
                    view.grad = grad[first : first + count, :rank]
            place.layer.a, place.layer.b = views if rank else (None, None)

    def _matrices(self, place: Place, values: Tensor) -> tuple[Tensor, Tensor]:
        """Views A [slots, rank, in, ...] and B [slots, rank, out] of values [slots, width]."""
        out, *given = place.layer.weight.shape
        a = values[:, place.a : place.a + self.rank * math.prod(given)].unflatten(1, (self.rank, *given))
        b = values[:, place.b : place.b + self.rank * out].unflatten(1, (self.rank, out))
        return a, b

    def load(self, slot: int, adapters: Sequence[tuple[Path, float]]) -> None:
        """Put the sum of published LoRAs, each times a scale, into a slot.

        Raises:
            UserError: see `joint` and `stack`; no slot is touched.
        """
        tensors = joint({self.part: self.module}, adapters)
        self.put(slot, self.stack(tensors, " + ".join(str(folder) for folder, _ in adapters)))

    def stack(self, tensors: Mapping[str, Tensor], where: str | Path = "adapter") -> Stack:
        """Canonical tensors, or what else has their names and shapes such as moments, ready for a slot.

        Their scale is not among them: `assign` gives it.

        Raises:
            UserError: a layer has no slots, or a rank is above theirs; `where` is named.
        """
        values = torch.zeros(1, self.weights.shape[1], dtype=self.weights.dtype, pin_memory=self.weights.is_cuda)
        ranks = {}
        for name, group in layers_of(tensors, where).items():
            if (place := self._places.get(name)) is None:
                raise UserError(f"{where}: {name}: it has no slots here; {len(self._places)} other layers have")
            rank = ranks[name] = len(group[A])
            if rank > self.rank:
                raise UserError(f"{where}: rank {rank} in {name}: the slots hold at most {self.rank}")
            a, b = self._matrices(place, values)
            a[0, :rank] = group[A]
            b[0, :rank] = group[B].flatten(1).T
        return Stack(values[0], ranks)

    @torch.no_grad()
    def put(self, slot: int, stack: Stack) -> None:
        """Write into a slot other than 0, over what is there. Not while a batch that reads it is in work."""
        if not 0 < slot < self.slots:
            raise ValueError(f"slot {slot}: expected 1 to {self.slots - 1}; slot 0 is the base")
        self.weights[slot].copy_(stack.values, non_blocking=True)
        if self.grads is not None:
            self.grads[slot].zero_()
        self._ranks[slot] = stack.ranks
        if not self.steady:
            self._seen = None

    def evict(self, slot: int) -> None:
        """Make a slot empty: rows that take it get the base."""
        self.put(slot, Stack(torch.zeros((), dtype=self.weights.dtype), {}))

    def parameter(self, slot: int) -> nn.Parameter:
        """A trained slot as one parameter [width], for an optimizer of its own.

        Elements that belong to no adapter are zero, get gradients of zero and so stay zero under AdamW.
        """
        if self.grads is None:
            raise ValueError("these slots are not trained")
        if slot not in self._parameters:
            self._parameters[slot] = nn.Parameter(self.weights[slot])
            self._parameters[slot].grad = self.grads[slot]
        return self._parameters[slot]

    def export(self, slot: int) -> dict[str, Tensor]:
        """Copies of a slot's tensors under canonical names, as a tuner exports them."""
        return self.named(slot, self.weights[slot])

    def named(self, slot: int, values: Tensor) -> dict[str, Tensor]:
        """Copies of what values [width] hold of a slot, such as its optimizer's moments, under canonical names."""
        tensors = {}
        for name, rank in self._ranks[slot].items():
            place = self._places[name]
            a, b = (matrix[0, :rank].detach() for matrix in self._matrices(place, values[None]))
            ones = (1,) * (a.dim() - 2)
            tensors[f"{name}.{A}"] = a.clone()
            tensors[f"{name}.{B}"] = b.T.clone(memory_format=torch.contiguous_format).view(-1, rank, *ones)
        return tensors


def joint(parts: Mapping[str, nn.Module], adapters: Sequence[tuple[Path, float]]) -> dict[str, Tensor]:
    """The sum of published LoRAs, each times a scale, as one of their joint rank: canonical tensors for a scale of 1.

    Raises:
        UserError: one is damaged or for other parts too, or `fits` refuses it.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for folder, factor in adapters:
        if (reason := fits(folder)) is not None:
            raise UserError(f"{folder}: {reason}; it needs a forward pass of its own")
        for name, pair in factors(fitting_lora(parts, folder), factor).items():
            found.setdefault(name, []).append(pair)
    tensors = {}
    for name, pairs in found.items():
        tensors[f"{name}.{A}"], tensors[f"{name}.{B}"] = concatenate(pairs)
    return tensors


def slot_layer(name: str, layer: nn.Module, rows: Rows) -> SlotLayer:
    """A layer with slots around it.

    Raises:
        UserError: it is another kind of layer, or a convolution by groups of channels.
    """
    if isinstance(layer, nn.Linear):
        return SlotLinear(name, layer, rows)
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return SlotConv(name, layer, rows)
    kind = f"{layer.groups} groups" if isinstance(layer, nn.Conv2d) else type(layer).__name__
    raise UserError(f"{name}: {kind}: linear layers and convolutions without groups can have slots")


def aligned(numel: int) -> int:
    """The next multiple of the alignment."""
    return math.ceil(numel / ALIGNMENT) * ALIGNMENT
