"""Which kinds of transfer are worth a trial, by how many images there are and how far from what the model draws."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gtl.config import Recipe, Study
from gtl.config.recipe import Source
from gtl.config.space import alternatives
from gtl.report.chart import short
from gtl.report.evaluations import interval
from gtl.types import Progress, quiet

KIND = "tuner.type"
FEWEST = 5
"""Images below which nothing is said of how far they are: each is looked at with its third neighbour."""
MANY = 100
"""Images from which whole layers can move without learning them by heart."""
NEAR = 0.5
"""Overlap with the model's own drawings from which images are near."""
EACH = 3
"""Trials that a kind has at least: of fewer the best says little of what it can do."""


@dataclass(frozen=True)
class Facts:
    """What is known of the images before anything was trained on them."""

    source: str
    """Of several sources the one that is farthest from what the model draws: the others keep what it can."""
    images: int
    overlap: float | None
    """With the model's own drawings of their captions: the smaller of the shares of the images that lie among the
    drawings, and of these among the images (recall and precision, Kynkaanniemi et al. 2019, arXiv 1904.06991). None:
    too few to tell."""
    low: float | None = None
    """Of its 95 % interval."""
    high: float | None = None

    @property
    def are_many(self) -> bool:
        """Whether they are enough for whole layers."""
        return self.images >= MANY

    @property
    def are_near(self) -> bool:
        """Whether the model draws such pictures already; few images of which nothing is known are taken for far."""
        return self.overlap is not None and self.overlap >= NEAR

    def __str__(self) -> str:
        """For people."""
        start = f"{self.source}: {self.images} images ({'many' if self.are_many else 'few'})"
        if self.overlap is None:
            return f"{start}, too few to tell how far they are from what the model draws; taken for far"
        share, reach = short(self.overlap), interval(self.low, self.high)
        near = "near" if self.are_near else "far"
        return f"{start}, {near}: with what the model draws of their captions they overlap by {share} ({reach})"


@dataclass(frozen=True)
class Verdict:
    """Whether a kind is tried, and why."""

    kind: str
    is_tried: bool
    why: str


def advise(facts: Facts, kinds: Sequence[str], trials: int) -> list[Verdict]:
    """Say of each kind whether it is worth trials.

    The usual four cases of transfer (few or many images, near or far from what the model knows; for how well layers
    transfer over a distance see Yosinski et al. 2014, arXiv 1411.1792): the fewer images, the fewer weights may move,
    and the farther they are, the more have to.

    Args:
        facts: Of the images.
        kinds: Values of `tuner.type`, of which some are left, in their order.
        trials: Of the whole study, of which every kind that is tried needs `EACH`.
    """
    found = {kind: judged(kind, facts) for kind in kinds}
    if not any(one.is_tried for one in found.values()):
        found = {kind: Verdict(kind, True, f"none of the kinds suits; {one.why}") for kind, one in found.items()}
    room = max(1, trials // EACH)
    by_weights = [kind for kind in ("lora", "prompt", "freeze", "full") if kind in found and found[kind].is_tried]
    for kind in by_weights[room:]:
        found[kind] = Verdict(kind, False, f"{trials} trials are enough for {room} kinds, {EACH} of each")
    return [found[kind] for kind in kinds]


def judged(kind: str, facts: Facts) -> Verdict:
    """What speaks for or against a kind."""
    many, near = facts.are_many, facts.are_near
    if kind == "prompt":
        why = "a word can name only what the model draws already"
        return Verdict(kind, near, f"{why}, as it does these" if near else f"{why}, and these are far")
    if kind == "freeze":
        few = "few images, which the model draws already, are no reason to move whole layers"
        return Verdict(kind, many or not near, few if near and not many else "late layers can move, early ones stay")
    if kind == "full":
        if not many:
            return Verdict(kind, False, f"{facts.images} images are learned by heart where every weight can move")
        risk = "the model draws these already: moving every weight puts at risk what it knows for nothing"
        return Verdict(kind, not near, risk if near else "many images, far from what it draws, can move every weight")
    return Verdict(kind, True, "moves little and reaches every layer: suits all cases")


def look_at(recipe: Recipe, progress: Progress = quiet) -> Facts:
    """Draw the captions of the images with the model as it is, and see how far the drawings overlap with the images.

    What is drawn is in the cache afterwards, for whoever evaluates the model alone.

    Raises:
        UserError: the model, the data or the extractor of features is not what it has to be.
    """
    from gtl.data.reference import reference
    from gtl.evaluate.run import evaluate
    from gtl.train.launch import open_model

    sources = recipe.data.source if isinstance(recipe.data.source, list) else [Source(source=recipe.data.source)]
    found = []
    for one in sources:
        data = recipe.data.model_copy(update={"source": one.source, "validation": 0.0})
        asked = recipe.evaluate.model_copy(update={"prompts": "auto", "metrics": ["precision", "recall"]})
        alone = recipe.model_copy(update={"data": data, "evaluate": asked})
        number = reference(data, open_model(alone, quiet), recipe.storage.cache, progress).number
        if number < FEWEST:
            found.append(Facts(one.source, number, None))
            continue
        scores = evaluate(alone, progress=progress)[0].scores
        score = min((scores[name] for name in asked.metrics), key=lambda each: each.value)
        found.append(Facts(one.source, number, score.value, score.low, score.high))
    return min(found, key=lambda one: -1.0 if one.overlap is None else one.overlap)


def narrowed(study: Study, kinds: Collection[str]) -> Study:
    """The study of these kinds alone, without the keys that apply to others only."""
    domain = study.space[KIND]
    left = tuple(kind for kind in domain.values if kind in kinds)
    others = [kind for kind in domain.values if kind not in kinds]
    space = {**study.space, KIND: domain.model_copy(update={domain.kind: left})}

    def applies(key: str) -> bool:
        when = space[key].when
        return all(outer in space for outer in when) and not (
            KIND in when and all(kind in others for kind in alternatives(when[KIND]))
        )

    while gone := [key for key in space if not applies(key)]:
        space = {key: one for key, one in space.items() if key not in gone}
    return study.model_copy(update={"space": space})
