"""Adapters combined into one: the arithmetic, on tensors.

What is combined are updates of weights, never A's with A's and B's with B's: a sum of products is not the product of
sums. The sum of LoRAs is one of their joint rank, s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2]; a lower rank takes its
largest singular values, and no update of that rank is nearer (Eckart and Young 1936). Of full weights a mean is taken
(model soups, Wortsman et al. 2022, arXiv 2203.05482).

TIES (Yadav et al. 2023, arXiv 2306.01708) keeps the largest values of each update and averages those of the sign that
has more mass; DARE (Yu et al. 2023, arXiv 2311.03099) drops values at random and rescales the others. Both are PEFT's,
on updates that have their weight already, so that it counts in the election of signs, and one of weight 0 is not there.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gtl.adapters.formats import A, B, LoraWeights, layers_of
from gtl.types import Progress, UserError, quiet

SUMS = ("linear", "cat", "svd")
"""Methods of the plain sum. linear: at the lowest rank that holds it. cat: the factors side by side. svd: at a rank."""
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Methods that drop values of every update first, named as in PEFT."""
METHODS = (*SUMS, *PRUNING)
DENSITY = 0.5
OVERSAMPLING, ITERATIONS = 8, 16
"""Directions beyond twice the rank, and rounds: of noise, which decays least, within 0.01 % of the smallest error."""


@dataclass(frozen=True)
class Method:
    """How updates become one."""

    name: str = "linear"
    rank: int | None = None
    """Of the result; None: the largest of the adapters', or of cat and linear what the sum has."""
    density: float | None = None
    """In (0, 1], share of each update's values that stay; None: half of them, where values are dropped."""
    seed: int = 0
    """Of what DARE drops."""

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise UserError(f"--method: {self.name!r}: expected one of {', '.join(METHODS)}")
        if self.rank is not None and self.name in ("linear", "cat"):
            raise UserError(f"--rank {self.rank}: {self.name} keeps the whole sum; use --method svd for a lower rank")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"--rank: {self.rank}: expected 1 or more")
        if self.density is not None and self.name in SUMS:
            raise UserError(f"--density {self.density:g}: {self.name} drops nothing; only {', '.join(PRUNING)} do")
        if self.density is not None and not 0 < self.density <= 1:
            raise UserError(f"--density: {self.density:g}: expected a number above 0 and at most 1")

    @property
    def is_random(self) -> bool:
        """Whether the seed counts."""
        return self.name.startswith("dare")

    @property
    def share(self) -> float | None:
        """Of values that stay; None where none is dropped."""
        return (self.density or DENSITY) if self.name in PRUNING else None


@dataclass(frozen=True)
class Weights:
    """The adapters' weights, in their order."""

    whole: Sequence[float]
    blocks: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Prefix of layers `<part>.<module>` -> a factor for each weight in them; the longest that fits counts."""

    def of(self, name: str) -> list[float]:
        """The weights in a layer or parameter."""
        fit = [prefix for prefix in self.blocks if f"{name}.".startswith(f"{prefix}.")]
        factors = self.blocks[max(fit, key=len)] if fit else [1.0] * len(self.whole)
        return [weight * factor for weight, factor in zip(self.whole, factors, strict=True)]


class Combined(NamedTuple):
    """A LoRA made of others."""

    tensors: dict[str, Tensor]
    """By canonical name, fp32, for a scale of 1; layers without any update are left out."""
    lost: float
    """Norm of what the rank cannot hold, as a share of the whole update's."""


def combine(loras: Sequence[LoraWeights], weights: Weights, method: Method, progress: Progress = quiet) -> Combined:
    """One LoRA of several, none of them a DoRA, layer by layer; in a layer that only some have, of those.

    Raises:
        UserError: the rank is higher than any layer takes.
    """
    updates: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for number, lora in enumerate(loras):
        for layer, (a, b) in factors(lora).items():
            if weight := weights.of(layer)[number]:
                updates.setdefault(layer, []).append((a, b * weight))
    if method.rank is not None and updates:
        possible = max(highest(pairs, method) for pairs in updates.values())
        if method.rank > possible:
            raise UserError(f"--rank: {method.rank}: is more than any layer's update can have; at most {possible}")
    tensors: dict[str, Tensor] = {}
    dropped = total = 0.0
    for done, (layer, pairs) in enumerate(sorted(updates.items())):
        progress("fuse", done, len(updates), layer)
        if method.name == "cat":
            a, b = concatenate(pairs)
        else:
            u, s, v, beyond = decompose(pairs, method, layer)
            rank = kept(s, pairs, method)
            dropped += float(s[rank:].double().square().sum()) + beyond
            total += float(s.double().square().sum()) + beyond
            if rank == 0:
                continue
            root = s[:rank].sqrt()  # half to each factor, as training would balance them
            a = (root[:, None] * v[:rank]).float().reshape(rank, *pairs[0][0].shape[1:])
            b = (u[:, :rank] * root).float().reshape(-1, rank, *pairs[0][1].shape[2:])
        tensors[f"{layer}.{A}"], tensors[f"{layer}.{B}"] = a.contiguous(), b.contiguous()
    progress("fuse", len(updates), len(updates))
    return Combined(tensors, (dropped / total) ** 0.5 if total else 0.0)


def factors(lora: LoraWeights, factor: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> A and B in fp32, B times its layer's scale and the factor: the update is B A."""
    found = {}
    for layer, group in layers_of(lora.tensors).items():
        scale = factor * lora.config.scale(layer, len(group[A]))
        found[layer] = group[A].float(), group[B].float() * scale
    return found


def concatenate(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A [sum of r, in, ...] and B [out, sum of r, ...] of the sum of updates B A."""
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)


class Decomposed(NamedTuple):
    """A layer's combined update by its singular values, largest first."""

    u: Tensor
    """[out, k]"""
    s: Tensor
    """[k]; 0 where there is only rounding."""
    v: Tensor
    """[k, in]"""
    beyond: float
    """Sum of squares of the singular values that were not looked for."""


def decompose(pairs: Sequence[tuple[Tensor, Tensor]], method: Method, layer: str) -> Decomposed:
    """A layer's combined update: all of a sum, and of another what its rank needs."""
    if method.name in PRUNING:
        dense = merge([b.flatten(1) @ a.flatten(1) for a, b in pairs], method, layer)
        return largest(dense, rank_of(pairs, method), layer)
    a, b = (factor.flatten(1).double() for factor in concatenate(pairs))
    # Of thin factors, so that the decomposition is one of [k, k], however large the layer.
    (left, r_left), (right, r_right) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    rounding = r_left.norm() * r_right.norm() * max(len(left), len(right)) * torch.finfo(s.dtype).eps
    return Decomposed(left @ u, torch.where(s > rounding, s, 0.0), v @ right.T, 0.0)  # 0 where updates cancel, too


def largest(matrix: Tensor, rank: int, name: str) -> Decomposed:
    """The largest singular values of a matrix [out, in], at least so many.

    Of a large one they are found by subspace iteration from random directions (Halko et al. 2011, arXiv 0909.4061): the
    whole decomposition takes minutes where this takes a second.
    """
    directions = 2 * rank + OVERSAMPLING
    if directions >= min(matrix.shape) / 2:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return Decomposed(u, s, v, 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(zlib.crc32(name.encode()))
        u, s, v = torch.svd_lowrank(matrix, directions, ITERATIONS)
    beyond = float(matrix.double().square().sum() - s.double().square().sum())
    return Decomposed(u, s, v.T, max(beyond, 0.0))


def rank_of(pairs: Sequence[tuple[Tensor, Tensor]], method: Method) -> int:
    """The rank that a layer is brought to: what is asked for, else of linear the sum's, and the largest of the rest."""
    ranks = [len(a) for a, _ in pairs]
    return method.rank or (sum(ranks) if method.name == "linear" else max(ranks))


def kept(s: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], method: Method) -> int:
    """How many singular values [k] stay: those that are more than rounding, up to the rank."""
    a, b = pairs[0]
    own = int((s > s[0] * max(b.shape[0], a[0].numel()) * torch.finfo(s.dtype).eps).sum())  # as numpy's matrix_rank
    return min(own, rank_of(pairs, method))


def highest(pairs: Sequence[tuple[Tensor, Tensor]], method: Method) -> int:
    """The highest rank that a layer's combined update can have."""
    a, b = pairs[0]
    room = min(b.shape[0], a[0].numel())
    return room if method.name in PRUNING else min(room, sum(len(a) for a, _ in pairs))


def merge(updates: Sequence[Tensor], method: Method, name: str) -> Tensor:
    """One update of several of the same shape that have their weight already; what DARE drops depends on the name."""
    from peft.utils import merge_utils

    equal = torch.ones(len(updates))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.default_generator.manual_seed(zlib.crc32(name.encode(), method.seed))
        warnings.filterwarnings("ignore", "The density 1", UserWarning)  # asked for: nothing is dropped
        combined: Tensor = getattr(merge_utils, method.name)(list(updates), equal, method.share)
    return combined


def soup(
    deltas: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor],
    weights: Weights,
    method: Method,
    progress: Progress = quiet,
) -> dict[str, Tensor]:
    """New weights of several models' by `<part>.<parameter>`: their mean, or the base with their updates combined.

    Args:
        deltas: Whole weights that moved.
        base: The model's own values, of what `needs_base` names.
        weights: In a mean their sum, in every block, is what they are divided by.
        method: linear is the mean.
        progress: Told of every tensor.

    Raises:
        UserError: the weights of a mean add up to nothing.
    """
    names = sorted({name for delta in deltas for name in delta})
    fused = {}
    for done, name in enumerate(names):
        progress("fuse", done, len(names), name)
        values = [delta.get(name, base.get(name)) for delta in deltas]
        shares = weights.of(name)
        found = [value for value in values if value is not None]
        dtype = found[0].dtype
        for value in found:
            dtype = torch.promote_types(dtype, value.dtype)
        if method.name == "linear":
            if not (total := sum(shares)):
                raise UserError(f"weights: in {name} they add up to 0; a mean divides by their sum")
            new = sum((value.float() * (share / total) for value, share in zip(found, shares, strict=True)))
        else:
            start = base[name].float()
            moved = [(value.float() - start) * w for value, w in zip(found, shares, strict=True) if w]
            new = start + merge(moved, method, name) if moved else start
        fused[name] = torch.as_tensor(new).to(dtype)
    progress("fuse", len(names), len(names))
    return fused


def needs_base(deltas: Sequence[Mapping[str, Tensor]], method: Method) -> set[str]:
    """Names of the weights whose values in the base a soup needs: where one has not moved what another has."""
    names = {name for delta in deltas for name in delta}
    return names if method.name != "linear" else {name for name in names if not all(name in delta for delta in deltas)}
