"""`gtl evaluate`: scores of a model and of adapters on it, by samples drawn on the cluster and held-out images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from gtl.adapters import Registry
from gtl.config import Recipe
from gtl.config.evaluate import Evaluate
from gtl.config.metrics import check_metrics, of_pictures
from gtl.config.names import parse_reference
from gtl.config.templates import PLAIN
from gtl.data.reference import Reference, reference
from gtl.evaluate.extract import Drawn, Item, examine, load_drawn
from gtl.evaluate.measure import (
    MAX_REAL,
    READER_FACTS,
    Found,
    Need,
    check_extractors,
    check_images,
    in_order,
    is_right,
    named,
    needs_of,
    pairs,
    score_all,
)
from gtl.evaluate.result import Copy, Evaluation, Sampling, Score
from gtl.evaluate.sampling import plan, requests
from gtl.generate.spread import Model, Order, Origin, Published, spread
from gtl.session import session
from gtl.storage import Store
from gtl.types import Progress, UserError, quiet

if TYPE_CHECKING:
    from PIL.Image import Image

    from gtl.families.base import Family

SAMPLES = "samples"
"""In the cache: folders of drawn samples, by the hash of all that decides them."""


def evaluate(
    recipe: Recipe, adapters: Sequence[str | Sequence[str] | None] = (None,), *, templates: Sequence[str] = (PLAIN,),
    progress: Progress = quiet,
) -> list[Evaluation]:  # fmt: skip
    """Score the recipe's model with each of some adapters, one at a time, on the same prompts, seeds and real images.

    Samples and features of real images are in the recipe's cache afterwards, and taken from there. The evaluation of an
    adapter is kept in its registry.

    Args:
        recipe: See `gtl.load_recipe`; its `evaluate` says what is measured, its `data` what is compared with.
        adapters: NAME[@VERSION|@ALIAS][:SCALE], or several that are active at once; None is the model alone.
        templates: What a prompt is drawn as, in place of the braces; it is judged by itself. Of several each adapter is
            scored with each, adapter by adapter.
        progress: Is called as it goes on.

    Raises:
        UserError: the recipe, an adapter, a backbone, the template or the data is not what it has to be.
    """
    from gtl.families import open_family

    check(recipe)
    for template in templates:
        if PLAIN not in template:
            raise UserError(f"template {template!r}: has no {PLAIN}, where the prompt goes; such as a photo of {PLAIN}")
    shelf, origin = Registry(recipe.storage.registry), recipe.model
    progress("model", 0, 0, origin.source)
    family = open_family(origin.source, origin.family, revision=origin.revision, variant=origin.variant)
    base = family.fingerprint()
    together = [(each,) if isinstance(each, str) else each or () for each in adapters]
    draws = bool(of_pictures(recipe.evaluate.metrics))
    chosen = [tuple(find(shelf, adapter, base, draws) for adapter in each) for each in together]
    with session() as cluster:
        images = reference(recipe.data, family, recipe.storage.cache, progress)
        check_images(recipe.evaluate, images)
        dtype = ("bf16" if cluster.gpus else "fp32") if origin.dtype == "auto" else origin.dtype
        return evaluate_all(recipe, shelf, chosen, family, images, dtype, progress, templates)


def evaluate_all(
    recipe: Recipe, shelf: Registry, chosen: Sequence[tuple[Published, ...]], family: Family, images: Reference,
    dtype: str, progress: Progress, templates: Sequence[str] = (PLAIN,), noise: int | None = None,
) -> list[Evaluation]:  # fmt: skip
    """`evaluate` on the connected cluster, of adapters and images that were found and checked.

    `noise` is the seed of what val_loss is measured at; None: that of a run's own looks.
    """
    origin, base = recipe.model, family.fingerprint()
    asked = recipe.evaluate.model_copy(update={"metrics": of_pictures(recipe.evaluate.metrics)})
    samplings = [plan(asked, images, dtype, template) for template in templates]
    check_extractors(asked, samplings[0].prompts)
    place = Origin(origin.source, origin.revision, origin.variant)
    pairings = [(adapters, sampling) for adapters in chosen for sampling in samplings]
    drawings = [
        Drawing(recipe.storage.cache, sampling, Model(place, base, adapters, dtype), asked.samples)
        for adapters, sampling in pairings
    ]
    losses = losses_of(recipe, drawings, family, dtype, progress, noise)
    if asked.metrics:
        draw(drawings, family, progress)
    found = []
    for (adapters, sampling), drawing, loss in zip(pairings, drawings, losses, strict=True):
        scores, nearest = measure(asked, drawing, images, progress)
        scores |= loss
        scores = {name: scores[name] for name in in_order(recipe.evaluate.metrics, scores)}
        evaluation = Evaluation(
            adapter=" + ".join(map(title, adapters)) or None, base={"source": origin.source, "fingerprint": base},
            dataset=images.fingerprint, images=images.number,
            held_out=len(images.held_out), sampling=sampling, scores=scores, nearest=nearest,
            samples=drawing.folder.url() if asked.metrics else None,
        )  # fmt: skip
        if len(adapters) == 1:  # of several it would be none's own
            shelf.add_evaluation(adapters[0].name, f"{evaluation.key}.json", evaluation.to_json())
            if nearest:
                picture = pairs(nearest, drawing.sample, images)
                shelf.add_evaluation(adapters[0].name, f"{evaluation.key}.png", picture)
        found.append(evaluation)
    return found


def check(recipe: Recipe) -> None:
    """Refuse what can be told from the recipe, before anything is drawn.

    Raises:
        UserError: names the key.
    """
    asked = recipe.evaluate
    if asked.prompts == [] and of_pictures(asked.metrics):
        raise UserError("evaluate.prompts: []: there is nothing to draw; give prompts, or auto for the captions")
    for name in asked.metrics:
        if name in of_pictures([name]):
            if recipe.objective.type == "classify":
                raise UserError(f"evaluate.metrics: {name}: is of pictures that are drawn, and classify draws none")
        elif not recipe.data.validation:
            raise UserError(
                f"evaluate.metrics: {name}: needs images that are held out; set data.validation to the share that the "
                "adapter was trained without, such as 0.05"
            )
    check_metrics(asked.metrics, asked.samples, asked.clip, "evaluate.samples")


def losses_of(
    recipe: Recipe, drawings: Sequence[Drawing], family: Family, dtype: str, progress: Progress, noise: int | None
) -> list[dict[str, Score]]:
    """What is asked for of each drawing's model that no pictures are drawn for, such as val_loss.

    Raises:
        UserError: see `validate`.
    """
    from gtl.evaluate.held_out import validate

    asked = recipe.evaluate.metrics
    wanted = set(asked) - set(of_pictures(asked))
    if not wanted:
        return [{} for _ in drawings]
    scores = validate(recipe, [drawing.model for drawing in drawings], family, dtype, progress, noise)
    for name in sorted(wanted):
        if name not in scores[0]:
            raise UserError(f"evaluate.metrics: {name}: no head of the model has it, or the images are too small")
    return [{name: score for name, score in own.items() if name in wanted} for own in scores]


def find(shelf: Registry, adapter: str, base: str, draws: bool = True) -> Published:
    """The version that a reference means, with its scale.

    Args:
        shelf: Holds it.
        adapter: NAME[@VERSION|@ALIAS][:SCALE].
        base: Fingerprint of the model that it has to be for.
        draws: Whether pictures of prompts alone are to be drawn with it.

    Raises:
        UserError: there is none, its files are damaged, or it was made for another model or to edit images.
    """
    card, version = shelf.resolve(adapter)
    if card.base.fingerprint != base:
        raise UserError(
            f"--adapter {adapter}: was made for {card.base.source} ({card.base.fingerprint[:12]}); "
            f"the recipe's model is another one ({base[:12]})"
        )
    name = f"{card.name}@{version}"
    if draws and card.edits:
        raise UserError(
            f"--adapter {adapter}: was taught to edit images, and these metrics are of prompts alone; set "
            "evaluate.metrics: [val_loss]"
        )
    shelf.fetch(name)  # a damaged one is known now
    return Published(shelf.store.root, name, parse_reference(adapter).scale, card.sampler)


def title(adapter: Published) -> str:
    """As people write it."""
    return adapter.name if adapter.scale == 1 else f"{adapter.name}:{adapter.scale:g}"


@dataclass(frozen=True)
class Drawing:
    """The samples of one model."""

    cache: str
    """URL of its root."""
    sampling: Sampling
    model: Model
    number: int

    @property
    def folder(self) -> Store:
        """Named by all that decides the samples but how many there are: more of them go beside the first."""
        decided = {"model": asdict(self.model), **self.sampling.model_dump(), "prompts": self.prompts}
        name = hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]
        return Store(f"{self.cache}/{SAMPLES}/{name}")

    @property
    def prompts(self) -> list[str]:
        """One a sample."""
        return self.sampling.prompts_of(self.number)

    @property
    def keys(self) -> list[str]:
        """File names, one a sample."""
        return [f"{i:06d}.png" for i in range(self.number)]

    def sample(self, position: int) -> Image:
        """One that is drawn already."""
        return load_drawn(Drawn(self.folder.url(), self.keys[position]))


def draw(drawings: Sequence[Drawing], family: Family, progress: Progress) -> None:
    """Draw what the cache lacks; what is done stays when this is cut off.

    Raises:
        UserError: the family cannot draw it, a worker met a mistake of the user's, or the cache cannot be written.
    """
    from gtl.generate.drawing import check as check_request

    missing: list[tuple[Store, str, Order]] = []
    for drawing in drawings:
        there = {key for key, _, _ in drawing.folder.list(recursive=False)}
        asked = requests(drawing.sampling, drawing.number, family, drawing.model.sampler)
        for key, request in zip(drawing.keys, asked, strict=True):
            if key not in there:
                check_request(request, family)
                missing.append((drawing.folder, key, Order(drawing.model, request)))
    before = sum(drawing.number for drawing in drawings) - len(missing)
    progress("draw", before, before + len(missing))

    def show(phase: str, done: int, total: int, detail: str = "") -> None:
        progress(phase, before + done, before + total, detail)

    with closing(spread([order for _, _, order in missing], progress=show)) as pictures:
        for position, png in pictures:
            folder, key, _ = missing[position]
            folder.write(key, png)


def measure(
    asked: Evaluate, drawing: Drawing, images: Reference, progress: Progress
) -> tuple[dict[str, Score], list[Copy]]:
    """The scores of a model's samples, and those nearest to images trained on.

    Raises:
        UserError: a backbone is not what it has to be, an image is gone, or features are not finite.
    """
    found = {
        need.extractor: read(drawing, progress) if need.extractor == "reader"
        else features_of(need, drawing, images, progress)
        for need in needs_of(asked)
    }  # fmt: skip
    return score_all(asked, found, images)


def features_of(need: Need, drawing: Drawing, images: Reference, progress: Progress) -> Found:
    """What metrics need of a backbone."""
    folder = drawing.folder.url()
    sets: dict[str, Sequence[Item]] = {
        "drawn": [Drawn(folder, key) for key in drawing.keys],
        "real": [*images.trained, *images.held_out][:MAX_REAL],
        "train": images.trained[:MAX_REAL],
        "held_out": images.held_out[:MAX_REAL],
        "text_features": drawing.prompts,
    }
    wanted = {name: items for name, items in sets.items() if name in ("drawn", *need.parts)}
    found, facts = examine(need.spec, Store(drawing.cache), wanted, progress)
    rows = named(*found.pop("drawn"))
    return Found(rows | {name: part.features for name, part in found.items()}, facts)


def read(drawing: Drawing, progress: Progress) -> Found:
    """Whether samples show what their prompts say, by the reader of the built-in scenes."""
    import torch

    right = []
    for position, prompt in enumerate(drawing.prompts):
        right.append([is_right(drawing.sample(position), prompt)])
        progress("judge", position + 1, drawing.number)
    return Found({"right": torch.tensor(right)}, READER_FACTS)
