"""How often a model draws what a caption of the built-in scenes says: drawn on the cluster, judged by their reader."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from gtl.data.scenes.reader import judge
from gtl.data.scenes.sets import SceneSet
from gtl.evaluate.intervals import wilson
from gtl.families import open_family
from gtl.generate.engine import Request
from gtl.images import decode, read_recipe, save_png
from gtl.session import get
from gtl.storage import explained
from gtl.types import Progress, UserError, quiet

RIGHT = ("shape", "colour", "style")
"""What has to be as the caption says for a picture to be right."""
CHUNK = 20
"""Pictures of one task: few enough for progress, many enough to pay for loading the model."""
MAX_BATCH = 10


@dataclass(frozen=True)
class Drawing:
    """Prompts for one model, and where their pictures go."""

    folder: Path
    """PNG files of the prompts' positions, in four digits."""
    source: str
    """The model's, as `model.source`."""
    prompts: tuple[str, ...]
    adapters: tuple[Path, ...] = ()
    """Published folders, all active at once."""
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
    import ray

    bases = {source: open_family(source).fingerprint() for source in {drawing.source for drawing in drawings}}
    missing = [
        (drawing, i)
        for drawing in drawings
        for i in range(len(drawing.prompts))
        if not _is_there(drawing, i, bases[drawing.source])
    ]
    total = sum(len(drawing.prompts) for drawing in drawings)
    done = total - len(missing)
    progress("draw", done, total)
    gpus = ray.cluster_resources().get("GPU", 0)
    task = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(_draw_chunk)
    running: dict[Any, tuple[Drawing, list[int]]] = {}
    for drawing in drawings:
        mine = [i for other, i in missing if other is drawing]
        for chunk in (mine[start : start + CHUNK] for start in range(0, len(mine), CHUNK)):
            reference = task.remote(replace(drawing, folder=Path()), chunk, bases[drawing.source])
            running[reference] = drawing, chunk
    while running:
        (ready,), _ = ray.wait(list(running), num_returns=1)
        drawing, chunk = running.pop(ready)
        for position, (png, recipe) in zip(chunk, get(ready), strict=True):
            with explained(str(drawing.file(position))):
                save_png(decode(png), drawing.file(position), recipe)
        done += len(chunk)
        progress("draw", done, total)


def _is_there(drawing: Drawing, position: int, base: str) -> bool:
    try:
        return read_recipe(drawing.file(position)) == _recipe(drawing, drawing.request(position, 0), base)
    except UserError:  # not drawn yet, or by something else
        return False


def _recipe(drawing: Drawing, request: Request, base: str) -> dict[str, Any]:
    # What a picture is told from others by; its side is the model's, and so is `base`, the hash of its files.
    own = {name: value for name, value in asdict(request).items() if name not in ("height", "width")}
    return {**own, "model": drawing.source, "base": base, "adapters": [str(folder) for folder in drawing.adapters]}


def _draw_chunk(drawing: Drawing, positions: Sequence[int], base: str) -> list[tuple[bytes, dict[str, Any]]]:
    """On a worker: the pictures at these positions as PNG, with what drew them."""
    import torch

    from gtl.generate.images import generate

    device = "cuda" if torch.cuda.is_available() else "cpu"
    family = open_family(drawing.source)
    requests = [drawing.request(position, min(family.default_size)) for position in positions]
    adapters = [(folder, 1.0) for folder in drawing.adapters]
    pictures: dict[int, bytes] = {}
    for index, image in generate(family, requests, adapters, device=device, max_batch=MAX_BATCH):
        sink = io.BytesIO()
        image.save(sink, "PNG")
        pictures[index] = sink.getvalue()
    return [(pictures[index], _recipe(drawing, request, base)) for index, request in enumerate(requests)]


def score(drawing: Drawing) -> Score:
    """Judge the pictures of a drawing that is done."""
    answers = [judge(decode(drawing.file(i)), prompt) for i, prompt in enumerate(drawing.prompts)]
    right = sum(all(answer[claim] for claim in RIGHT) for answer in answers)
    names = dict.fromkeys(name for answer in answers for name in answer)
    claims = {}
    for name in names:
        said = [answer[name] for answer in answers if name in answer]
        claims[name] = sum(said) / len(said)
    return Score(right, len(answers), claims)
