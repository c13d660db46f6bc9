"""A training run as its folder shows it: metrics, recipe, card, pictures."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gtl.config.load import read_yaml
from gtl.config.names import parse_reference
from gtl.images import BrokenImage, preview, read_recipe
from gtl.report.evaluations import Scores, read_look, read_looks, read_scores
from gtl.storage import Store
from gtl.types import UserError

MAX_PICTURES = 24
"""Grids on a page; of more the page shows some at even distances, the first and the last among them."""
LARGE, SMALL = 1600, 640
"""Longest side, in pixels, of the newest grid and of the others."""

STUDY = "study.yaml"
"""In a study's folder, which tells it from a run's."""

Row = dict[str, float]


@dataclass(frozen=True)
class Picture:
    """A grid of samples."""

    step: int
    """Optimizer steps made before it."""
    uri: str
    """The whole picture, as a data: URI."""
    width: int
    """In pixels, of the grid as it was drawn."""
    prompts: tuple[str, ...]
    """Left to right, row by row; empty where the file does not say."""


@dataclass(frozen=True)
class Run:
    """What a run has left so far."""

    name: str
    version: str
    url: str
    """Of its folder."""
    recipe: dict[str, Any]
    recipe_text: str
    rows: list[Row]
    """Metrics that are numbers, by name, with their step; what was not finite is NaN."""
    result: dict[str, Any] | None
    """None until all steps are made."""
    card: dict[str, Any] | None
    """None until the adapter is published."""
    pictures: list[Picture]
    """By step."""
    num_pictures: int
    """Grids in the folder, of which `pictures` may be a part."""
    looks: dict[int, dict[str, Any]]
    """Evaluations of the run's own looks, by step."""
    scores: list[Scores]
    """Evaluations of the published adapter, the newest first, and of the look that it was at."""

    @property
    def title(self) -> str:
        """NAME@VERSION."""
        return f"{self.name}@{self.version}"

    @property
    def best_step(self) -> int | None:
        """After how many steps the published weights were had, where they are not the last."""
        return (self.result or {}).get("best_step")

    def bounds(self, metric: str) -> list[tuple[float, float, float]]:
        """(step, low, high) of the looks that have an interval of a metric."""
        scores = ((step, look["scores"].get(metric, {})) for step, look in sorted(self.looks.items()))
        return [(step, score["low"], score["high"]) for step, score in scores if score.get("low") is not None]

    def series(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) of the rows that have a metric."""
        return [(row["step"], row[metric]) for row in self.rows if metric in row]


def find_run(text: str, runs: str) -> Store:
    """The folder of a run or study: of NAME (its newest version), of NAME@VERSION, or the one of that path or URL.

    Args:
        text: What has a `/` in it, or is `.` or `..`, is a path or URL.
        runs: Folder or bucket URL of all runs.

    Raises:
        UserError: there is no such run.
    """
    if "/" in text or text in (".", ".."):
        folder = Store(text)
        if not is_shown(folder):
            raise UserError(
                f"run {text}: no recipe.yaml or study.yaml in it; give the folder of one, RUNS/NAME/VERSION"
            )
        return folder
    name, version, scale = parse_reference(text)
    if scale != 1:
        raise UserError(f"run {text!r}: a run has no scale; write NAME or NAME@VERSION")
    store = Store(runs)
    versions = [v for v in store.folders(name) if is_shown(store.sub(f"{name}/{v}"))]
    if not versions:
        names = ", ".join(store.folders()) or "nothing"
        raise UserError(f"run {text!r}: no such run under {store.url()}, where there is {names}; see --runs")
    if version is not None and version not in versions:
        raise UserError(f"run {text!r}: {name} has no such version under {store.url()}; it has: {', '.join(versions)}")
    return store.sub(f"{name}/{version or versions[-1]}")


def is_shown(folder: Store) -> bool:
    """Whether a folder is that of a run or of a study."""
    return folder.exists("recipe.yaml") or folder.exists(STUDY)


def read_run(folder: Store) -> Run:
    """Read a run's folder.

    Raises:
        UserError: it has no metrics yet, or a store fails.
    """
    name, version = folder.url().split("/")[-2:]
    rows = list(read_rows(folder))
    if not rows:
        raise UserError(f"run {name}@{version}: no metrics yet in {folder.url()}; they come with its first steps")
    text = folder.read("recipe.yaml").decode()
    pictures, total = read_pictures(folder)
    recipe, card, result = read_yaml(text), read_json(folder, "adapter.json"), read_json(folder, "result.json")
    looks = read_looks(folder)
    scores = read_scores(recipe["storage"]["registry"], name, version) if card else []
    if looks:
        shown = (result or {}).get("best_step", max(looks))
        scores += [read_look(folder, step, looks[step]) for step in looks if step == shown]
    return Run(
        name,
        version,
        folder.url(),
        recipe,
        text,
        with_scores(rows, looks),
        result,
        card,
        pictures,
        total,
        looks,
        scores,
    )


def with_scores(rows: Sequence[Row], looks: Mapping[int, dict[str, Any]]) -> list[Row]:
    """Rows with what was measured of their looks, which those that were scored beside training lack."""
    known = {int(row["step"]): row for row in rows}
    added = {step: {name: score["value"] for name, score in look["scores"].items()} for step, look in looks.items()}
    steps = sorted({*known, *added})
    return [{**known.get(step, {"step": float(step)}), **added.get(step, {})} for step in steps]


def read_json(folder: Store, key: str) -> dict[str, Any] | None:
    """An object's value; None if there is none."""
    return json.loads(folder.read(key)) if folder.exists(key) else None


def read_rows(folder: Store) -> Iterator[Row]:
    """The rows of `metrics.jsonl` that name their step; a last line that was cut off is left out."""
    if not folder.exists("metrics.jsonl"):
        return
    for line in folder.read("metrics.jsonl").decode().splitlines(keepends=True):
        row = json.loads(line) if line.endswith("\n") else {}
        numbers = {key: float(value) for key, value in row.items() if type(value) in (int, float)}
        if "step" in numbers:
            yield numbers


def read_pictures(folder: Store) -> tuple[list[Picture], int]:
    """The newest grid large, the others small; and how many the folder has."""
    keys = list(find_pictures(folder).values())
    pictures = [read_picture(folder, key, LARGE if key == keys[-1] else SMALL) for key in spread(keys, MAX_PICTURES)]
    return [picture for picture in pictures if picture is not None], len(keys)


def find_pictures(folder: Store) -> dict[int, str]:
    """The grids of samples, by step."""
    keys = [key for key, _, _ in folder.list("samples", recursive=False) if key.endswith(".png")]
    return {int(Path(key).stem): key for key in keys if Path(key).stem.isdigit()}


def read_picture(folder: Store, key: str, side: int) -> Picture | None:
    """A grid, no larger than `side`; None if the file is damaged."""
    with tempfile.TemporaryDirectory() as temporary:
        file = folder.download(key, Path(temporary, "grid.png"))
        try:
            uri, width = preview(file.read_bytes(), side)
        except BrokenImage:
            return None
        try:
            prompts = tuple(read_recipe(file).get("prompts", ()))
        except UserError:  # it was not gtl that wrote it
            prompts = ()
    return Picture(int(Path(key).stem), uri, width, prompts)


def spread(keys: list[str], most: int) -> list[str]:
    """At most so many of them at even distances, the first and the last included."""
    if len(keys) <= most:
        return keys
    return [keys[round(i * (len(keys) - 1) / (most - 1))] for i in range(most)]
