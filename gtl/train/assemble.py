"""From a recipe to modules: the live parts of the model, what moves in them, and the players that learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from gtl.config import Recipe
from gtl.types import DTYPES

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from gtl.families.base import Family
    from gtl.objectives.base import Objective
    from gtl.tuners.base import Tuner


@dataclass(frozen=True)
class Trainee:
    """The model at hand, with what moves in it and what it learns."""

    family: Family
    tuner: Tuner
    objective: Objective
    parts: dict[str, nn.Module]
    """What is loaded of the model, by name."""
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    """Of parts that learn: what changes beside their parameters, such as a power iteration's vectors."""
    players: dict[str, nn.Module]
    dtype: torch.dtype
    """Of the arithmetic, and of what does not move; see `gtl.train.place`."""


def assemble(recipe: Recipe, dtype: str, *, adapted: bool = True) -> Trainee:
    """Load the live parts, let the tuner mark or inject what moves, and make the objective's players.

    Weights are mapped from their files as they are stored there, and take no memory until the engine places them.

    Args:
        recipe: Says all.
        dtype: Of what does not move: fp32 or bf16.
        adapted: False: nothing moves, and the tuner has not been there yet.

    Raises:
        UserError: the model's files or the adapter to continue from are not what they have to be, or do not fit the
            recipe.
    """
    from gtl.adapters import Registry
    from gtl.families import open_family
    from gtl.train.blocks import checkpoint_blocks, compile_blocks, without_text
    from gtl.tuners import make_tuner

    model, init = recipe.model, recipe.tuner.init
    family = open_family(model.source, model.family, revision=model.revision, variant=model.variant)
    folder = None if init is None or not adapted else Registry(recipe.storage.registry).fetch(init)
    trainee = join(recipe, dtype, family, make_tuner(recipe.tuner, family), "cpu", folder, adapted)
    if (main := trainee.parts.get(family.main)) is not None:
        blocks = list(chain.from_iterable(family.blocks(main)))
        if recipe.train.activation_checkpointing:
            checkpoint_blocks(main, blocks)
        if recipe.train.compile:
            readers = family.cross_attentions(main)
            # Where text enters in other ways, any block may see it.
            fixed = without_text(blocks, readers) if readers and not recipe.data.buckets else []
            compile_blocks(main, blocks, fixed)
    return trainee


def outline(recipe: Recipe, dtype: str, family: Family) -> Trainee:
    """What `assemble` would make, on meta: shapes and dtypes, from config files alone.

    Raises:
        UserError: the model's configs are not what they have to be, or do not fit the recipe.
    """
    from gtl.train.place import place
    from gtl.tuners import make_tuner

    # Where adapters start from changes none of their sizes.
    start = {"init": None} | ({"initialization": "default"} if recipe.tuner.type == "lora" else {})
    trainee = join(recipe, dtype, family, make_tuner(recipe.tuner.model_copy(update=start), family), "meta")
    for part in trainee.parts.values():
        place(part, trainee.dtype, "meta")
    return trainee


def join(
    recipe: Recipe, dtype: str, family: Family, tuner: Tuner, device: str, init: Path | None = None,
    adapted: bool = True,
) -> Trainee:  # fmt: skip
    """The live parts on a device, with what the tuner does to them, under the objective's players.

    On meta nothing is quantised: shapes, and what autograd keeps, are the same without.
    """
    import torch

    from gtl.families import denoising
    from gtl.objectives import make_objective
    from gtl.objectives.instruct import show_originals
    from gtl.train.quantize import quantize

    objective, arithmetic = make_objective(recipe.objective, family), getattr(torch, DTYPES[dtype])
    parts = {name: family.load(name, device=device) for name in live_parts(recipe, family, objective)}
    if recipe.model.weights == "random" and device != "meta":
        for name in recipe.tuner.train or list(parts):
            parts[name] = fresh(family, name, recipe.train.seed)
    if recipe.needs.originals:
        show_originals(denoising(family), parts[family.main])
    if not adapted:
        for part in parts.values():
            part.requires_grad_(False)
    parameters = tuner.apply(parts, recipe.train.seed, init) if adapted else {}
    kind, main = recipe.model.quantization, parts.get(family.main)
    if kind is not None and main is not None and device != "meta":
        # After the tuner: what it takes of the base, such as DoRA's norms and PiSSA's factors, is of the whole weights.
        quantize(main, chain.from_iterable(family.blocks(main)), kind, arithmetic)
    buffers: dict[str, Tensor] = {}
    for name, part in parts.items():
        part.train(any(parameter.requires_grad for parameter in part.parameters()))
        if part.training:
            keep_frozen_statistics(part)
            buffers |= {f"{name}.{key}": buffer for key, buffer in iterated(part)}
    players = objective.players(parts, arithmetic)
    return Trainee(family, tuner, objective, parts, parameters, buffers, players, arithmetic)


def iterated(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What moves with every pass, by name: the vectors by which spectral normalisation finds singular values, and the
    statistics of batches. The count of these is read by nobody."""
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.utils.parametrizations import _SpectralNorm

    for name, module in part.named_modules():
        if isinstance(module, _SpectralNorm):
            yield from module.named_buffers(name)
        elif isinstance(module, _BatchNorm) and module.training:
            yield from ((key, value) for key, value in module.named_buffers(name) if value.is_floating_point())


def keep_frozen_statistics(part: nn.Module) -> None:
    """Let batch normalisation whose own weights are frozen go by the statistics that it has, and leave them."""
    from torch.nn.modules.batchnorm import _BatchNorm

    for module in part.modules():
        if isinstance(module, _BatchNorm) and module.affine and not module.weight.requires_grad:
            module.eval()


def fresh(family: Family, part: str, seed: int) -> nn.Module:
    """A part with the weights that its network begins with, drawn by a seed."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return family.build(part)


def live_parts(recipe: Recipe, family: Family, objective: Objective) -> list[str]:
    """The parts that run in the training process; the one that the objective is about comes first.

    Raises:
        UserError: the recipe trains a part that the model or the objective does not have.
    """
    from gtl.objectives import live_parts as parts_of
    from gtl.tuners.base import trained_parts

    trained_parts(recipe.tuner.train, objective.parts)
    return parts_of(objective, family, recipe.needs)
