"""Published adapters fused into a new one."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtl.adapters.apply import fitting_lora
from gtl.adapters.base import empty_parts, open_base
from gtl.adapters.card import Card, Fusion, Lineage
from gtl.adapters.delta import match_delta, spellings, write_delta
from gtl.adapters.formats import A, LoraExport, layers_of, write_lora
from gtl.adapters.registry import Registry
from gtl.adapters.sharing import DORA, fits
from gtl.config.names import Reference, check_name, new_version
from gtl.types import Progress, UserError, quiet, sampler_of

if TYPE_CHECKING:
    from torch import Tensor

    from gtl.adapters.combine import Method, Weights


def fuse(
    registry: Registry,
    chosen: Sequence[tuple[str, float]],
    method: str = "linear",
    *,
    name: str,
    version: str | None = None,
    rank: int | None = None,
    density: float | None = None,
    blocks: Mapping[str, Sequence[float]] | None = None,
    seed: int = 0,
    progress: Progress = quiet,
) -> Reference:
    """Publish one adapter made of several of the same base: LoRAs, or deltas, which give a mean of the models.

    Args:
        registry: Holds them, and gets the new one.
        chosen: NAME, NAME@VERSION or NAME@ALIAS, each with its weight.
        method: One of `combine.METHODS`.
        name: Of the new adapter.
        version: Of the new adapter; None: a new one.
        rank: Of a LoRA's layers; see `combine.Method`.
        density: Share of values that stay; see `combine.Method`.
        blocks: Prefix of layers -> a factor for every adapter's weight in them, or one for all.
        seed: Of what DARE drops.
        progress: Told of every layer.

    Raises:
        UserError: an argument is out of its range, there is no such adapter, they do not go together, nothing is left,
            or the version exists.
    """
    from gtl.adapters.combine import Method, Weights

    check_name(name, "--name")
    way = Method(method, rank, density, seed)
    if len(chosen) < 2:
        raise UserError(f"fuse: {len(chosen)} adapter; expected two or more, each NAME[@VERSION|@ALIAS][:WEIGHT]")
    cards = [registry.show(reference) for reference, _ in chosen]
    for number, card in enumerate(cards):
        if called(card) in map(called, cards[:number]):
            raise UserError(f"adapter {called(card)}: is given twice; give it once, with the weight you want")
    check_alike(cards, way)
    weights = Weights([weight for _, weight in chosen], for_each(blocks or {}, len(chosen)))
    with ExitStack() as until, tempfile.TemporaryDirectory() as place:
        folders = [registry.fetch(called(card), until) for card in cards]
        write = fuse_loras if cards[0].kind == "lora" else fuse_deltas
        tuner, lost = write(cards[0], folders, weights, way, Path(place), progress)
        fusion = Fusion(
            method=method, adapters=[called(card) for card in cards], weights=list(weights.whole),
            blocks={prefix: list(factors) for prefix, factors in weights.blocks.items()}, rank=rank, lost=lost,
            density=way.share, seed=seed if way.is_random else None,
        )  # fmt: skip
        sampler = sampler_of(card.sampler for card in cards)
        card = Card(name=name, version=version or new_version(name), kind=cards[0].kind, base=cards[0].base,
                    tuner=tuner, sampler=sampler, lineage=Lineage(fusion=fusion))  # fmt: skip
        registry.publish(name, card.version, Path(place), card)
    return Reference(name, card.version, 1.0)


def called(card: Card) -> str:
    """NAME@VERSION."""
    return f"{card.name}@{card.version}"


def check_alike(cards: Sequence[Card], method: Method) -> None:
    """Refuse adapters that cannot be fused.

    Raises:
        UserError: they are of other bases or kinds, one is a DoRA, or the method is for LoRAs only.
    """
    first = cards[0]
    for card in cards:
        if card.base.fingerprint != first.base.fingerprint:
            raise UserError(
                f"adapter {called(card)}: is for {card.base.source} ({card.base.fingerprint[:12]}), and "
                f"{called(first)} for {first.base.source} ({first.base.fingerprint[:12]}); only adapters of one base "
                "can be fused"
            )
        if card.kind != first.kind:
            raise UserError(
                f"adapter {called(card)}: is a {card.kind}, and {called(first)} a {first.kind}; only adapters of one "
                "kind can be fused"
            )
        if (card.kind != "delta" or card.edits) and (reason := fits(card)) is not None:
            raise UserError(f"adapter {called(card)}: {reason}; it cannot be fused")
    if first.kind == "delta" and (method.name in ("cat", "svd") or method.rank is not None):
        given = f"--method {method.name}" if method.rank is None else f"--rank {method.rank}"
        raise UserError(f"{given}: is for LoRAs; {called(first)} is a delta, of which linear takes the mean")


def for_each(blocks: Mapping[str, Sequence[float]], number: int) -> dict[str, list[float]]:
    """Factors of blocks, one for each of a number of adapters.

    Raises:
        UserError: a prefix has neither one factor nor so many.
    """
    for prefix, factors in blocks.items():
        if len(factors) not in (1, number):
            raise UserError(f"--blocks: {prefix}: {len(factors)} factors; expected one, or one for each of {number}")
    return {prefix: list(factors) * (number // len(factors)) for prefix, factors in blocks.items()}


def check_blocks(weights: Weights, names: Iterable[str]) -> None:
    """Refuse a prefix of no layer.

    Raises:
        UserError: there is one.
    """
    known = sorted(names)
    for prefix in weights.blocks:
        if not any(f"{name}.".startswith(f"{prefix}.") for name in known):
            tops = sorted({".".join(name.split(".")[:2]) for name in known})
            raise UserError(f"--blocks: {prefix}: no layer of the adapters begins so; there are {', '.join(tops)}")


def fuse_loras(
    card: Card, folders: Sequence[Path], weights: Weights, method: Method, place: Path, progress: Progress
) -> tuple[dict[str, Any], float]:
    """Write a LoRA of several; its tuner section, and the share of it that is lost to the rank."""
    from gtl.adapters.combine import combine

    # Under the model's own names, which a version of transformers may spell otherwise than another's files.
    parts = empty_parts(open_base(card, weights=False))
    loras = [fitting_lora(parts, folder) for folder in folders]
    for folder, lora in zip(folders, loras, strict=True):
        if lora.config.dora:
            raise UserError(f"{folder}: {DORA}; it cannot be fused")
        if bad := next((name for name, tensor in lora.tensors.items() if not tensor.isfinite().all()), None):
            raise UserError(f"{folder}: {bad}: holds values that are no numbers; it cannot be fused")
    check_blocks(weights, {layer for lora in loras for layer in layers_of(lora.tensors)})
    tensors, lost = combine(loras, weights, method, progress)
    if not tensors:
        raise UserError("weights: nothing is left of the adapters with these")
    ranks = {layer: len(group[A]) for layer, group in layers_of(tensors).items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # alpha = rank everywhere: a scale of 1.
    config = LoraExport(rank=rank, alpha=rank, alphas={layer: r for layer, r in ranks.items() if r != rank})
    write_lora(tensors, place, config=config)
    return {"type": "lora", "rank": rank, "alpha": rank, "dora": False, "rslora": False}, lost


def fuse_deltas(
    card: Card, folders: Sequence[Path], weights: Weights, method: Method, place: Path, progress: Progress
) -> tuple[dict[str, Any], float]:
    """Write a delta of several; its tuner section, and that nothing is lost to a rank."""
    from gtl.adapters.combine import needs_base, soup

    for prefix, factors in weights.blocks.items():
        if method.name == "linear" and len(set(factors)) == 1:
            raise UserError(
                f"--blocks: {prefix}={factors[0]:g}: changes nothing in a mean, which divides by the weights' sum; "
                f"give {len(folders)} factors, one for each adapter"
            )
    parts = empty_parts(open_base(card, weights=False))
    deltas = [{f"{part}.{name}": value for part, name, _, value in match_delta(parts, folder)} for folder in folders]
    check_blocks(weights, {name for delta in deltas for name in delta})
    write_delta(soup(deltas, base_values(card, needs_base(deltas, method)), weights, method, progress), place)
    return {"type": card.tuner.get("type", "full")}, 0.0


def base_values(card: Card, wanted: set[str]) -> dict[str, Tensor]:
    """The base's own values of weights `<part>.<parameter>`."""
    if not wanted:
        return {}
    family = open_base(card)
    found: dict[str, Tensor] = {}
    for part in sorted({name.partition(".")[0] for name in wanted}):
        for name, value in family.weights(part):
            found |= {full: value for s in spellings(name) if (full := f"{part}.{s}") in wanted}
    return found
