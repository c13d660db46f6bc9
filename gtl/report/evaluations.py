"""What `gtl evaluate` left beside an adapter, for a page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gtl.config.names import check_name
from gtl.images import BrokenImage, preview
from gtl.report.chart import short
from gtl.storage import Store

LOOKS = "scores"
"""In a run's folder: evaluations by the steps made before."""
MOST = 5
"""Evaluations on a page: the newest."""
SIDE = 1600
"""Longest side, in pixels, of the picture of samples beside training images."""


@dataclass(frozen=True)
class Scores:
    """One evaluation."""

    title: str
    """When it was made, and of what samples."""
    rows: list[dict[str, str]]
    """A metric each."""
    notes: list[str]
    """What a reader has to know of them."""
    nearest: str | None
    """The samples that are nearest to images trained on, above those: a data: URI."""
    values: dict[str, Any]
    """The evaluation's file."""


def read_scores(registry: str, name: str, version: str) -> list[Scores]:
    """The newest evaluations of a version.

    Raises:
        UserError: the registry is out of reach.
    """
    folder = Store(f"{registry}/{check_name(name)}/{version}/evaluations")
    keys = [key for key, _, _ in folder.list(recursive=False)]
    found = [(json.loads(folder.read(key)), key.removesuffix(".json")) for key in keys if key.endswith(".json")]
    found.sort(key=lambda pair: str(pair[0]["created"]), reverse=True)
    return [make_scores(values, read_pairs(folder, f"{key}.png")) for values, key in found[:MOST]]


def read_looks(run: Store) -> dict[int, dict[str, Any]]:
    """The evaluations of a run's own looks, by step."""
    keys = [key for key, _, _ in run.list(LOOKS, recursive=False) if key.endswith(".json")]
    return {int(key.rpartition("/")[2].removesuffix(".json")): json.loads(run.read(key)) for key in sorted(keys)}


def read_look(run: Store, step: int, values: dict[str, Any]) -> Scores:
    """The tables of one of them."""
    found = make_scores(values, read_pairs(run, f"{LOOKS}/{step:08d}.png"))
    return replace(found, title=f"After {step} steps, {found.title}")


def read_pairs(folder: Store, key: str) -> str | None:
    """A picture as a data: URI, if it is there and whole."""
    if not folder.exists(key):
        return None
    try:
        return preview(folder.read(key), SIDE)[0]
    except BrokenImage:
        return None


def make_scores(values: dict[str, Any], nearest: str | None) -> Scores:
    """The tables of an evaluation's file."""
    how, scores = values["sampling"], values["scores"]
    samples = max(score["num_fake"] for score in scores.values())
    drawn = (
        f"{samples} samples of {len(how['prompts'])} prompts, {how['steps']} steps, guidance "
        f"{short(how['guidance'])}, {how['width']}x{how['height']}, {how['dtype']}, seeds from {how['seed']}; "
    )
    title = (
        f"{values['created'][:16].replace('T', ' ')} UTC: {drawn if samples else ''}{values['images']} real images, "
        f"{values['held_out']} of them held out"
    )
    rows = [row for name, score in scores.items() for row in rows_of(name, score)]
    notes = [f"{name}: {score['note']}" for name, score in scores.items() if score["note"]]
    return Scores(title, rows, notes, nearest, values)


def rows_of(name: str, score: dict[str, Any]) -> Iterator[dict[str, str]]:
    """A metric, then what it is the mean of."""
    row = {
        "metric": name, "value": short(score["value"]),
        "95 % interval": interval(score["low"], score["high"]),
        "better": "higher" if score["higher_is_better"] else "lower",
        "drawn": str(score["num_fake"] or ""), "real": str(score["num_real"] or ""),
        "extractor": f"{score['extractor']} ({score['resize']}, {score['dtype']})",
    }  # fmt: skip
    yield row
    for part, value in score.get("parts", {}).items():
        yield {**dict.fromkeys(row, ""), "metric": part, "value": short(value)}


def interval(low: float | None, high: float | None) -> str:
    """For people."""
    return "none" if low is None or high is None else f"{short(low)} to {short(high)}"
