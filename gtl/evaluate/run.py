"""`gtl evaluate`: samples of a model and of adapters on it, drawn on the cluster, and their scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from gtl.adapters import Registry
from gtl.config import Recipe
from gtl.config.metrics import METRICS
from gtl.config.names import parse_reference
from gtl.data.reference import Reference, reference
from gtl.evaluate.extract import Facts, examine, load_square
from gtl.evaluate.result import Copy, Evaluation, Sampling, Score, make_score
from gtl.evaluate.scenes import is_right
from gtl.generate.spread import Model, Order, Origin, Published, spread
from gtl.images import decode, encode_png, grid
from gtl.session import session
from gtl.storage import Store
from gtl.types import Progress, UserError, quiet

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from gtl.evaluate.memorization import Memorization
    from gtl.families.base import DiffusionFamily
    from gtl.generate.engine import Request

SAMPLES = "samples"
"""In the cache: folders of drawn samples, by the hash of all that decides them."""
READER = "builtin:reader"
"""What looks at pictures of the built-in scenes."""
MAX_REAL = 10_000
"""Real images that are looked at, of more by the order of their hashes."""
NEAREST = 16
"""Samples that are named with the training images they are nearest to."""
COLUMNS, SIDE = 8, 192
"""Of the picture of those: pairs in a row, and the longest side of a cell in pixels."""


def evaluate(
    recipe: Recipe, adapters: Sequence[str | None] = (None,), *, progress: Progress = quiet
) -> list[Evaluation]:
    """Score the recipe's model with each of some adapters, one at a time, on the same prompts, seeds and real images.

    Samples and features of real images are in the recipe's cache afterwards, and taken from there. The evaluation of an
    adapter is kept in its registry.

    Args:
        recipe: See `gtl.load_recipe`; its `evaluate` says what is measured, its `data` what is compared with.
        adapters: NAME[@VERSION|@ALIAS][:SCALE]; None is the model alone.
        progress: Is called as it goes on.

    Raises:
        UserError: the recipe, an adapter, a backbone or the data is not what it has to be.
    """
    from gtl.families import open_family

    check(recipe)
    shelf, origin = Registry(recipe.storage.registry), recipe.model
    progress("model", 0, 0, origin.source)
    family = open_family(origin.source, origin.family, revision=origin.revision, variant=origin.variant)
    base = family.fingerprint()
    chosen = [None if adapter is None else find(shelf, adapter, base) for adapter in adapters]
    with session() as cluster:
        images = reference(recipe.data, family, recipe.storage.cache, progress)
        check_images(recipe, images)
        dtype = ("bf16" if cluster.gpus else "fp32") if origin.dtype == "auto" else origin.dtype
        sampling = plan(recipe, images, dtype)
        drawings = [
            Drawing(
                recipe.storage.cache, sampling,
                Model(Origin(origin.source, origin.revision, origin.variant), base,
                      () if adapter is None else (adapter,), dtype),
                recipe.evaluate.samples,
            )
            for adapter in chosen
        ]  # fmt: skip
        draw(drawings, family, progress)
        measured = [measure(recipe, drawing, images, progress) for drawing in drawings]
    found = []
    for adapter, drawing, (scores, nearest) in zip(chosen, drawings, measured, strict=True):
        evaluation = Evaluation(
            adapter=None if adapter is None else title(adapter), base={"source": origin.source, "fingerprint": base},
            dataset=images.fingerprint, images=len(images.trained) + len(images.held_out),
            held_out=len(images.held_out), sampling=sampling, scores=scores, nearest=nearest,
            samples=drawing.folder.url(),
        )  # fmt: skip
        if adapter is not None:
            shelf.add_evaluation(adapter.name, f"{evaluation.key}.json", evaluation.to_json())
            if nearest:
                shelf.add_evaluation(adapter.name, f"{evaluation.key}.png", pairs(nearest, drawing, images))
        found.append(evaluation)
    return found


def check(recipe: Recipe) -> None:
    """Refuse what can be told from the recipe, before anything is drawn.

    Raises:
        UserError: names the key.
    """
    asked = recipe.evaluate
    if asked.prompts == []:
        raise UserError("evaluate.prompts: []: there is nothing to draw; give prompts, or auto for the captions")
    for name in asked.metrics:
        if not METRICS[name].needs:
            raise UserError(f"evaluate.metrics: {name}: is measured while a run goes on; leave it out here")
        if METRICS[name].extractor == "clip" and asked.clip is None:
            raise UserError(f"evaluate.clip: null: {name} needs a CLIP model; give its folder or hub id")
        for part, fewest in METRICS[name].needs.items():
            if part not in ("real", "train", "held_out") and asked.samples < fewest:
                raise UserError(f"evaluate.samples: {asked.samples}: {name} needs at least {fewest}")


def check_images(recipe: Recipe, images: Reference) -> None:
    """Refuse what there are too few images for.

    Raises:
        UserError: names the metric.
    """
    there = {
        "real": len(images.trained) + len(images.held_out), "train": len(images.trained),
        "held_out": len(images.held_out),
    }  # fmt: skip
    for name in recipe.evaluate.metrics:
        for part, fewest in METRICS[name].needs.items():
            if there.get(part, fewest) < fewest:
                advice = "set data.validation, such as 0.1" if part == "held_out" else "leave it out, or give more"
                raise UserError(
                    f"evaluate.metrics: {name}: needs {fewest} images ({part}), there are {there[part]}; {advice}"
                )


def find(shelf: Registry, adapter: str, base: str) -> Published:
    """The version that a reference means, with its scale.

    Raises:
        UserError: there is none, its files are damaged, or it was made for another model.
    """
    card, version = shelf.resolve(adapter)
    if card.base.fingerprint != base:
        raise UserError(
            f"--adapter {adapter}: was made for {card.base.source} ({card.base.fingerprint[:12]}); "
            f"the recipe's model is another one ({base[:12]})"
        )
    name = f"{card.name}@{version}"
    shelf.fetch(name)  # a damaged one is known now
    return Published(shelf.store.root, name, parse_reference(adapter).scale)


def title(adapter: Published) -> str:
    """As people write it."""
    return adapter.name if adapter.scale == 1 else f"{adapter.name}:{adapter.scale:g}"


def plan(recipe: Recipe, images: Reference, dtype: str) -> Sampling:
    """The prompts and how they are drawn.

    Raises:
        UserError: they are to be the images' captions, and no image has one.
    """
    asked = recipe.evaluate
    prompts = list(images.captions) if asked.prompts == "auto" else list(asked.prompts)
    if not prompts:
        raise UserError("evaluate.prompts: auto: no image has a caption; give prompts")
    height, width = images.size
    return Sampling(
        prompts=prompts[: asked.samples], negative_prompt=asked.negative_prompt, seed=asked.seed, steps=asked.steps,
        guidance=asked.guidance, height=height, width=width, dtype=dtype,
    )  # fmt: skip


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
        known = self.sampling.prompts
        return [known[i % len(known)] for i in range(self.number)]

    @property
    def keys(self) -> list[str]:
        """File names, one a sample."""
        return [f"{i:06d}.png" for i in range(self.number)]

    def requests(self) -> Iterator[Request]:
        """One a sample."""
        from gtl.generate.engine import Request

        how = self.sampling
        for i, prompt in enumerate(self.prompts):
            yield Request(
                prompt, how.height, how.width, negative_prompt=how.negative_prompt, seed=how.seed + i, steps=how.steps,
                guidance=how.guidance,
            )  # fmt: skip


def draw(drawings: Sequence[Drawing], family: DiffusionFamily, progress: Progress) -> None:
    """Draw what the cache lacks; what is done stays when this is cut off.

    Raises:
        UserError: the family cannot draw it, a worker met a mistake of the user's, or the cache cannot be written.
    """
    from gtl.generate.engine import check as check_request

    missing: list[tuple[Store, str, Order]] = []
    for drawing in drawings:
        there = {key for key, _, _ in drawing.folder.list(recursive=False)}
        for key, request in zip(drawing.keys, drawing.requests(), strict=True):
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
    recipe: Recipe, drawing: Drawing, images: Reference, progress: Progress
) -> tuple[dict[str, Score], list[Copy]]:
    """The scores of a model's samples, and those nearest to images trained on.

    Raises:
        UserError: a backbone is not what it has to be, an image is gone, or features are not finite.
    """
    from gtl.evaluate.memorization import memorization
    from gtl.evaluate.scores import score

    scores: dict[str, Score] = {}
    nearest: list[Copy] = []
    specs = {"backbone": recipe.evaluate.backbone, "clip": recipe.evaluate.clip or "", "reader": READER}
    for kind, spec in specs.items():
        names = [name for name in recipe.evaluate.metrics if METRICS[name].extractor == kind]
        if not names:
            continue
        needs = {part for name in names for part in METRICS[name].needs}
        if kind == "reader":
            features, facts = read(drawing, progress)
        else:
            features, facts = features_of(spec, needs, drawing, images, progress)
        for name in names:
            if missing := [part for part in METRICS[name].needs if part not in features]:
                raise UserError(f"evaluate.{kind}: {spec}: gives no {' or '.join(missing)}, which {name} needs")
            if name == "memorization":  # which says more than a number
                found = memorization(**{part: features[part] for part in METRICS[name].needs})
                scores[name] = make_score(found.rank, facts)
                nearest = copies(found, images)
            else:
                scores[name] = make_score(score(name, features), facts)
    return {name: scores[name] for name in recipe.evaluate.metrics}, nearest


def features_of(
    spec: str, needs: set[str], drawing: Drawing, images: Reference, progress: Progress
) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """What metrics need of a backbone, by the names of the table of metrics, and what they have to say of it."""
    real = [*images.trained, *images.held_out][:MAX_REAL]
    with examine(spec, Store(drawing.cache)) as source:
        drawn, logits = source.drawn(drawing.folder, drawing.keys, progress)
        found = {"fake": drawn, "samples": drawn, "image_features": drawn}
        if logits is not None:
            found["logits"] = logits
        if "real" in needs:
            found["real"] = source.real(real, progress)[0]
        if "train" in needs:
            found["train"] = source.real(images.trained[:MAX_REAL], progress)[0]
            found["held_out"] = source.real(images.held_out[:MAX_REAL], progress)[0]
        if "text_features" in needs:
            found["text_features"] = source.texts(drawing.prompts)
        return found, asdict(source.facts())


def read(drawing: Drawing, progress: Progress) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Whether samples show what their prompts say, by the reader of the built-in scenes.

    Raises:
        UserError: a prompt is no caption of scenes.
    """
    import torch

    from gtl.data.scenes.captions import read_caption
    from gtl.data.scenes.reader import judge

    right = []
    for done, (key, prompt) in enumerate(zip(drawing.keys, drawing.prompts, strict=True)):
        if not read_caption(prompt).things:
            raise UserError(f"evaluate.metrics: prompt_accuracy: {prompt!r}: no caption of the built-in scenes")
        right.append([float(is_right(judge(decode(drawing.folder.read(key)), prompt)))])
        progress("judge", done + 1, drawing.number)
    return {"right": torch.tensor(right)}, asdict(Facts(READER, "as it is drawn", "exact"))


def copies(found: Memorization, images: Reference) -> list[Copy]:
    """The samples that are nearest to images trained on."""
    nearest = found.matches[:NEAREST]
    return [Copy(sample=m.sample, uri=images.trained[m.train].uri, distance=m.distance) for m in nearest]


def pairs(nearest: Sequence[Copy], drawing: Drawing, images: Reference) -> bytes:
    """A picture of samples, each above the image trained on that it is nearest to, with the distance; a PNG file.

    Raises:
        UserError: an image is gone.
    """
    works = {work.uri: work for work in images.trained}
    columns = min(COLUMNS, len(nearest))
    shown = nearest[: len(nearest) // columns * columns]
    cells: list[Image] = []
    labels: list[str] = []
    for start in range(0, len(shown), columns):
        row = shown[start : start + columns]
        cells += [decode(drawing.folder.read(drawing.keys[match.sample])) for match in row]
        cells += [load_square(works[match.uri]) for match in row]
        labels += [f"sample {match.sample}" for match in row] + [f"{match.distance:.3f}" for match in row]
    for cell in cells:
        cell.thumbnail((SIDE, SIDE))
    return encode_png(grid(cells, columns, labels), {"nearest": [match.model_dump() for match in shown]})
