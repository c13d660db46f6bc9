"""From what a backbone makes of pictures to scores: the same for pictures in a folder and for a run's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

from gtl.backbones import find_backbone
from gtl.config.evaluate import Evaluate
from gtl.config.metrics import METRICS
from gtl.data.reference import Reference
from gtl.evaluate.extract import Facts, load_square
from gtl.evaluate.result import Copy, Score, make_score
from gtl.images import encode_png, grid
from gtl.types import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from gtl.evaluate.memorization import Memorization

READER = "builtin:reader"
"""What looks at pictures of the built-in scenes."""
READER_FACTS = Facts(READER, "as it is drawn", "exact")
MAX_REAL = 10_000
"""Real images that are looked at, of more by the order of their hashes."""
NEAREST = 16
"""Samples that are named with the training images they are nearest to."""
COLUMNS, SIDE = 8, 192
"""Of the picture of those: pairs in a row, and the longest side of a cell in pixels."""


class Need(NamedTuple):
    """What is wanted of one extractor."""

    extractor: str
    """As the table of metrics calls it."""
    spec: str
    """What the recipe names for it."""
    metrics: list[str]
    parts: set[str]
    """What those are computed from."""


class Found(NamedTuple):
    """What an extractor made."""

    rows: dict[str, Tensor]
    """By the parts of the table of metrics."""
    facts: Facts


def needs_of(asked: Evaluate) -> Iterator[Need]:
    """What the metrics want of each extractor."""
    for extractor, spec in {"backbone": asked.backbone, "clip": asked.clip or "", "reader": READER}.items():
        if names := [name for name in asked.metrics if METRICS[name].extractor == extractor]:
            yield Need(extractor, spec, names, {part for name in names for part in METRICS[name].needs})


def check_images(asked: Evaluate, images: Reference) -> None:
    """Refuse what there are too few images for.

    Raises:
        UserError: names the metric.
    """
    there = {
        "real": images.number, "train": len(images.trained),
        "held_out": len(images.held_out),
    }  # fmt: skip
    for name in asked.metrics:
        for part, fewest in METRICS[name].needs.items():
            if there.get(part, fewest) < fewest:
                advice = "set data.validation, such as 0.1" if part == "held_out" else "leave it out, or give more"
                raise UserError(
                    f"evaluate.metrics: {name}: needs {fewest} images ({part}), there are {there[part]}; {advice}"
                )


def check_extractors(asked: Evaluate, prompts: Sequence[str]) -> None:
    """Refuse extractors that are not there, and prompts that the reader cannot read, before pictures are drawn.

    Raises:
        UserError: names the key.
    """
    for need in needs_of(asked):
        if need.extractor != "reader":
            find_backbone(need.spec)
            continue
        for prompt in prompts:
            check_caption(prompt)


def score_all(asked: Evaluate, found: Mapping[str, Found], images: Reference) -> tuple[dict[str, Score], list[Copy]]:
    """The scores of a model's samples, and those nearest to images trained on.

    Args:
        asked: What is measured.
        found: By extractor.
        images: That the samples are compared with.

    Raises:
        UserError: a backbone does not give what a metric needs, or features are not finite.
    """
    from gtl.evaluate.memorization import memorization
    from gtl.evaluate.scores import FEW, score

    scores: dict[str, Score] = {}
    nearest: list[Copy] = []
    for need in needs_of(asked):
        rows, facts = found[need.extractor]
        for name in need.metrics:
            if missing := [part for part in METRICS[name].needs if part not in rows]:
                raise UserError(
                    f"evaluate.{need.extractor}: {need.spec}: gives no {' or '.join(missing)}, which {name} needs"
                )
            if name == "memorization":  # which says more than a number
                copied = memorization(**{part: rows[part] for part in METRICS[name].needs})
                scores[name] = make_score(copied.rank, asdict(facts))
                nearest = copies(copied, images)
            else:
                scores[name] = make_score(score(name, rows), asdict(facts))
        if "fid" in need.metrics and min(len(rows["real"]), len(rows["fake"])) < FEW:
            scores["kid"] = make_score(score("kid", rows), asdict(facts))  # which the note of fid sends readers to
    return {name: scores[name] for name in in_order(asked.metrics, scores)}, nearest


def in_order(asked: Sequence[str], scores: Mapping[str, Score]) -> list[str]:
    """Metrics as they were asked for; kid, if nobody did, comes before the fid that it stands in for."""
    added = [name for name in scores if name not in asked]
    return [name for metric in asked for name in ([*added, metric] if metric == "fid" else [metric])]


def named(drawn: Tensor, logits: Tensor | None) -> dict[str, Tensor]:
    """What metrics call the features of samples."""
    rows = {"fake": drawn, "samples": drawn, "image_features": drawn}
    return rows if logits is None else {**rows, "logits": logits}


def is_right(picture: Image, prompt: str) -> float:
    """1 if a picture shows what a caption of the built-in scenes says, else 0.

    Raises:
        UserError: the prompt is no such caption.
    """
    from gtl.data.scenes.reader import judge
    from gtl.evaluate.scenes import is_right as all_right

    check_caption(prompt)
    return float(all_right(judge(picture, prompt)))


def check_caption(prompt: str) -> None:
    """Refuse a prompt that the reader of the built-in scenes cannot judge a picture by.

    Raises:
        UserError: the prompt is no such caption.
    """
    from gtl.data.scenes.captions import read_caption

    if not read_caption(prompt).things:
        raise UserError(f"evaluate.metrics: prompt_accuracy: {prompt!r}: no caption of the built-in scenes")


def copies(found: Memorization, images: Reference) -> list[Copy]:
    """The samples that are nearest to images trained on."""
    nearest = found.matches[:NEAREST]
    return [Copy(sample=m.sample, uri=images.trained[m.train].uri, distance=m.distance) for m in nearest]


def pairs(nearest: Sequence[Copy], sample: Callable[[int], Image], images: Reference) -> bytes:
    """A picture of samples, each above the image trained on that it is nearest to, with the distance; a PNG file.

    Args:
        nearest: Samples with their images.
        sample: The picture of a sample.
        images: Where those trained on are.

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
        cells += [sample(match.sample) for match in row]
        cells += [load_square(works[match.uri]) for match in row]
        labels += [f"sample {match.sample}" for match in row] + [f"{match.distance:.3f}" for match in row]
    for cell in cells:
        cell.thumbnail((SIDE, SIDE))
    return encode_png(grid(cells, columns, labels), {"nearest": [match.model_dump() for match in shown]})
