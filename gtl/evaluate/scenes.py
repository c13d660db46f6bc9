"""How often a model draws what a caption of the built-in scenes says: drawn on the cluster, judged by their reader."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from gtl.data.scenes.reader import judge
from gtl.data.scenes.sets import SceneSet
from gtl.evaluate.intervals import wilson
from gtl.families import open_family
from gtl.generate.request import Request
from gtl.generate.spread import Model, Order, Origin, Published, spread
from gtl.images import decode, read_recipe, write_png
from gtl.storage import explained
from gtl.types import Progress, UserError, quiet

RIGHT = ("shape", "colour", "style")
"""What has to be as the caption says for a picture to be right."""
MAX_BATCH = 10


@dataclass(frozen=True)
class Drawing:
    """Prompts for one model, and where their pictures go."""

    folder: Path
    """PNG files of the prompts' positions, in four digits."""
    source: str
    """The model's, as `model.source`."""
    prompts: tuple[str, ...]
    adapters: tuple[Published, ...] = ()
    """All active at once."""
    steps: int = 25
    guidance: float = 7.5
    seed: int = 0
    """Of the first picture; each has its own."""

    def request(self, position: int, side: int) -> Request:
        """How one of the pictures is drawn."""
        prompt, seed = self.prompts[position], self.seed + position
        return Request(prompt, side, side, seed=seed, steps=self.steps, guidance=self.guidance)

    def file(self, position: int) -> Path:
        """Of one of the pictures."""
        return self.folder / f"{position:04d}.png"


@dataclass(frozen=True)
class Score:
    """How many pictures were right."""

    right: int
    total: int
    claims: dict[str, float]
    """What captions claim (shape, colour, size, ...) -> the share of those that claim it in whose picture it is so."""

    @property
    def share(self) -> float:
        """Right of all."""
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share, for other prompts of the kind."""
        return wilson(self.right, self.total)


def new_prompts(scenes: SceneSet, number: int, known: Collection[str] = ()) -> tuple[str, ...]:
    """The first captions of a set that are distinct and not among those known.

    Raises:
        ValueError: a set has not so many.
    """
    # `count` does not decide what a picture of a set shows, so that one can go on behind it.
    captions = dict.fromkeys(scenes.caption(index) for index in range(50 * number))
    found = tuple(islice((caption for caption in captions if caption not in known), number))
    if len(found) < number:
        raise ValueError(f"{scenes}: {len(found)} captions, {number} asked for")
    return found


def draw(drawings: Sequence[Drawing], progress: Progress = quiet) -> None:
    """Draw what is not there yet, on all CPUs or GPUs of the connected cluster.

    Pictures of other prompts, models or settings that an earlier call left in a folder are drawn again.

    Raises:
        UserError: a model or an adapter is wrong, or a folder cannot be written.
    """
    families = {source: open_family(source) for source in {drawing.source for drawing in drawings}}
    fingerprints = {source: family.fingerprint() for source, family in families.items()}
    missing: list[tuple[Path, Order]] = []
    for drawing in drawings:
        model = Model(Origin(drawing.source), fingerprints[drawing.source], drawing.adapters)
        side = min(families[drawing.source].default_size)
        for position in range(len(drawing.prompts)):
            order = Order(model, drawing.request(position, side), _recipe(model))
            if not _is_there(drawing.file(position), order):
                missing.append((drawing.file(position), order))
    total = sum(len(drawing.prompts) for drawing in drawings)
    there = total - len(missing)
    progress("draw", there, total)

    def show(phase: str, done: int, total: int, detail: str = "") -> None:
        progress(phase, there + done, there + total, detail)

    with closing(spread([order for _, order in missing], max_batch=MAX_BATCH, progress=show)) as pictures:
        for index, png in pictures:
            with explained(str(missing[index][0])):
                write_png(png, missing[index][0])


def _is_there(file: Path, order: Order) -> bool:
    try:
        return read_recipe(file) == {**asdict(order.request), **order.recipe}
    except UserError:  # not drawn yet, or by something else
        return False


def _recipe(model: Model) -> dict[str, Any]:
    """What a picture is told from others by, beside its request."""
    adapters = [f"{adapter.registry}/{adapter.name}" for adapter in model.adapters]
    return {"model": model.origin.source, "base": model.fingerprint, "adapters": adapters}


def score(drawing: Drawing) -> Score:
    """Judge the pictures of a drawing that is done."""
    answers = [judge(decode(drawing.file(i)), prompt) for i, prompt in enumerate(drawing.prompts)]
    right = sum(is_right(answer) for answer in answers)
    names = dict.fromkeys(name for answer in answers for name in answer)
    claims = {}
    for name in names:
        said = [answer[name] for answer in answers if name in answer]
        claims[name] = sum(said) / len(said)
    return Score(right, len(answers), claims)


def is_right(answer: Mapping[str, bool]) -> bool:
    """Whether a picture is as its caption says in what has to be, of which a caption need not claim all."""
    return all(answer.get(claim, True) for claim in RIGHT)
