"""What `gtl train` calls val_loss, of published models: on the same images, noise and times, on the cluster."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from gtl.adapters import Registry, apply
from gtl.adapters.apply import moved
from gtl.adapters.base import model_parts
from gtl.config import Recipe
from gtl.config.judged import SAME_LOSS
from gtl.config.objectives import Objective as ObjectiveConfig
from gtl.config.pairs import Needs, with_trained
from gtl.data.dataset import Dataset
from gtl.data.prepare import prepare
from gtl.evaluate.estimate import Estimate, estimate
from gtl.evaluate.outcomes import measure as outcomes_of
from gtl.evaluate.result import Score, make_score
from gtl.evaluate.validation import MAX_IMAGES, Chunk, Validation, parts_of
from gtl.families import denoising, seeing
from gtl.generate.crew import (
    Batch,
    Crew,
    check_code,
    choose_gpus,
    choose_places,
    naming_machine,
    work_through,
)
from gtl.generate.spread import Model, open_model, size_of
from gtl.storage import Store
from gtl.types import DTYPES, Progress, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from gtl.families.base import Family

PIECE = 8
"""Images that an actor looks at before it says something."""
RESIZE = "cut as for training"


@dataclass(frozen=True)
class HeldOut:
    """Held-out images in the cache, and the loss that is measured on them; plain values, which travel."""

    cache: str
    """URL of its root."""
    dataset: str
    """Fingerprint of the images."""
    objective: ObjectiveConfig
    needs: Needs
    seed: int
    """Of the noise."""


class Look(NamedTuple):
    """One image that one model is shown."""

    model: Model
    image: int
    """Position among the held-out ones."""


def validate(
    recipe: Recipe, models: Sequence[Model], family: Family, dtype: str, progress: Progress, noise: int | None = None,
) -> list[dict[str, Score]]:  # fmt: skip
    """val_loss of each model, and what is measured of what its heads say, on the connected cluster.

    Args:
        recipe: Says what the loss is and which images are held out; those that the cache lacks are encoded.
        models: The recipe's model with an adapter on it, or alone.
        family: The recipe's opened model.
        dtype: fp32 or bf16, of the frozen weights.
        progress: Is called as it goes on.
        noise: Seed of the noise and the times. None: the one that looks at a run have.

    Raises:
        UserError: an adapter moves what the loss does not depend on, or an image, the model or the cache is not what it
            has to be.
    """
    needs, cache = needs_of(recipe, models, family), recipe.storage.cache
    dataset = prepare(recipe.data, family, cache, dtype=dtype, needs=needs, held_out=True, progress=progress)
    seed = recipe.data.seed if noise is None else noise
    held_out = HeldOut(cache, dataset.fingerprint, recipe.objective, needs, seed)
    images = [entry.record.sha256 for entry in dataset.entries[:MAX_IMAGES]]
    kind = recipe.model.quantization
    note = "" if kind is None else f"of whole weights; a run sees those of the base rounded to {kind}"
    facts = {"extractor": name_of(held_out, dataset, models[0]), "resize": RESIZE, "dtype": dtype}
    scores = []
    for losses, outcomes in measure(models, held_out, len(images), progress):
        own = {"val_loss": make_score(val_loss(losses, images, note), facts, parts_of(losses.mean(dim=0).tolist()))}
        if outcomes:
            # Truth does not depend on the model: heads on other networks, for the same classes, compare.
            told = {**facts, "extractor": truth_of(family, dataset)} if needs.labels else facts
            once = torch.tensor([images.index(image) == at for at, image in enumerate(images)])
            for name, (whole, parts) in outcomes_of({key: rows[once] for key, rows in outcomes.items()}).items():
                own[name] = make_score(whole, told, parts)
        scores.append(own)
    return scores


def truth_of(family: Family, dataset: Dataset) -> str:
    """The labels, with a hash of them and of the tasks."""
    tasks = {name: vars(task) for name, task in seeing(family).tasks.items()}
    images = [[entry.record.sha256, entry.record.labels] for entry in dataset.entries[:MAX_IMAGES]]
    return f"labels:{hashlib.sha256(json.dumps([tasks, images], sort_keys=True).encode()).hexdigest()[:8]}"


def needs_of(recipe: Recipe, models: Sequence[Model], family: Family) -> Needs:
    """What the loss of all of these models reads: the same, whichever of them moves its text encoders.

    Raises:
        UserError: one moves a part that has nothing to do with the loss.
    """
    from gtl.objectives import live_parts, make_objective

    whole = {part: family.load(part, device="meta") for part in model_parts(family)}
    trained = {
        name.partition(".")[0]: adapter.name
        for model in models
        for adapter in model.adapters
        for name in moved(whole, Registry(adapter.registry).fetch(adapter.name))
    }
    needs = with_trained(recipe.needs, sorted(trained))
    seen = live_parts(make_objective(recipe.objective, family), family, needs)
    for part in sorted(trained.keys() - set(seen)):
        raise UserError(
            f"evaluate.metrics: val_loss: {trained[part]} moves {part}, which objective.type {recipe.objective.type} "
            "does not look at; leave val_loss out here"
        )
    return needs


def name_of(held_out: HeldOut, dataset: Dataset, model: Model) -> str:
    """The objective, with a hash of all but the adapter that the loss depends on."""
    config = held_out.objective.model_dump(mode="json")
    told = {key: value for key, value in config.items() if f"objective.{key}" not in SAME_LOSS}
    records = [(entry.variants[0], entry.record, entry.originals[:1]) for entry in dataset.entries[:MAX_IMAGES]]
    images = [
        [key, record.captions[:1], *originals, *filter(None, [record.labels])] for key, record, originals in records
    ]
    decided = json.dumps([model.fingerprint, held_out.seed, told, images], sort_keys=True)
    return f"{held_out.objective.type}:{hashlib.sha256(decided.encode()).hexdigest()[:8]}"


def measure(
    models: Sequence[Model], held_out: HeldOut, images: int, progress: Progress
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Of each model losses [images, strata], float64, and what came of every image, [images, ...].

    Raises:
        UserError: a model or the cache is not what it has to be, or workers die again and again.
    """
    looks = [Look(model, image) for model in models for image in range(images)]
    gpus = choose_gpus()
    memory = 0 if gpus else max(size_of(model) for model in models)
    number = choose_places(gpus, math.ceil(len(looks) / PIECE), memory)
    batches = [
        Batch(list(range(at, at + len(piece))), piece, f"held-out images of {held_out.dataset[:12]}")
        for start in range(0, len(looks), images)
        for at in range(start, start + images, PIECE)
        for piece in [looks[at : min(at + PIECE, start + images)]]
    ]
    found: list[Seen] = [Seen([], {})] * len(looks)
    for position, seen in work_through(Crew(Validator, (held_out,), batches, number, gpus), "val_loss", progress):
        found[position] = seen
    sides = [found[start : start + images] for start in range(0, len(looks), images)]
    return [
        (torch.tensor([seen.losses for seen in side], dtype=torch.float64),
         {name: torch.cat([seen.outcomes[name] for seen in side]) for name in side[0].outcomes})
        for side in sides
    ]  # fmt: skip


def val_loss(losses: Tensor, images: Sequence[str], note: str = "") -> Estimate:
    """The mean over images and strata, with the interval that other held-out images would give.

    Args:
        losses: [entries, strata].
        images: Which image an entry is of; copies of one are no independent draws.
        note: What a reader has to know.

    Raises:
        UserError: a loss is no finite number.
    """
    own = losses.mean(dim=1)
    if wrong := int((~own.isfinite()).sum()):
        raise UserError(f"val_loss: NaN or infinity on {wrong} of {len(own)} held-out images; expected finite numbers")
    at = {image: position for position, image in enumerate(dict.fromkeys(images))}
    influence = own.new_zeros(len(at)).index_add(0, torch.tensor([at[image] for image in images]), own - own.mean())
    return estimate("val_loss", float(own.mean()), own.new_empty(0), influence * len(at) / len(own), note=note)


class Seen(NamedTuple):
    """What one image came to."""

    losses: list[float]
    """By stratum."""
    outcomes: dict[str, Tensor]
    """[1, ...], see `gtl.types.Losses`."""


class Validator:
    """Lives as an actor on one device, and keeps the model that it looked at last."""

    def __init__(self, device: str, held_out: HeldOut) -> None:
        """Nothing is loaded before the first batch."""
        self._device, self._held_out = device, held_out
        self._lock = threading.Lock()
        self._held: tuple[Model, Callable[[int], Seen]] | None = None

    def begin(self, code: str) -> None:
        """See `Member`."""
        check_code(code)

    @torch.no_grad()
    def work(self, looks: Sequence[Look]) -> list[Seen]:
        """What the images of one model came to.

        Raises:
            UserError: the model, an adapter or the cache is wrong; the machine is named.
        """
        model = looks[0].model
        with naming_machine(), self._lock:
            if self._held is None or self._held[0] != model:
                self._held = None  # its memory is needed
                self._held = model, load(model, self._held_out, self._device)
            return [self._held[1](look.image) for look in looks]


def load(model: Model, held_out: HeldOut, device: str) -> Callable[[int], Seen]:
    """What an image comes to with a model.

    Raises:
        UserError: the model, an adapter or the cache is wrong.
    """
    from gtl.objectives import live_parts, make_objective
    from gtl.objectives.instruct import show_originals

    family, adapters = open_model(model)
    objective, dtype = make_objective(held_out.objective, family), getattr(torch, DTYPES[model.dtype])
    parts = {
        part: family.load(part, torch.float32 if part == family.codec else dtype, device)
        for part in live_parts(objective, family, held_out.needs)
    }
    if held_out.needs.originals:  # the model alone, too
        show_originals(denoising(family), parts[family.main])
    for index, (folder, scale) in enumerate(adapters):
        apply(parts, folder, f"adapter{index}", scale)
    player = next(iter(objective.players(parts, dtype).values())).eval()
    dataset = Dataset.load(Store(held_out.cache), held_out.dataset)
    validation = Validation(dataset, objective, batch_size=1, rank=0, world=1, seed=held_out.seed)

    def look(image: int) -> Seen:
        # One image at a time: so they are told apart, and it fits wherever a picture can be drawn.
        chunks = (Chunk([image], stratum) for stratum in range(objective.strata))
        found = [validation.look(lambda batch: player(batch.to(device)), chunk) for chunk in chunks]
        return Seen([loss for loss, _ in found], found[0][1])

    return look
