"""What each kind of transfer is worth: the method beside its proper baseline, on the same images and steps."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gtl.adapters import Card, Registry
from gtl.adapters.fuse import called
from gtl.bench.choosing import Chosen
from gtl.bench.comparisons import COMPARISONS, Arm, Comparison
from gtl.bench.editing import Edited, edit_pairs
from gtl.bench.pace import Drawn, seconds_a_picture
from gtl.config import Recipe, load_recipe
from gtl.config.metrics import of_pictures
from gtl.evaluate.estimate import Difference, Estimate, difference
from gtl.evaluate.result import Evaluation, Score, compare_by
from gtl.evaluate.run import evaluate
from gtl.families.files import write_once
from gtl.report.chart import short
from gtl.report.evaluations import interval
from gtl.report.text import columns
from gtl.session import session
from gtl.train.launch import train_once
from gtl.types import Progress, UserError, quiet, sampler_of

RECIPES = Path(__file__).parents[1] / "recipes" / "demo"
RESULT = "transfer.json"


@dataclass(frozen=True)
class Row:
    """What came of a comparison."""

    comparison: str
    metric: str
    titles: tuple[str, str]
    """Of the method and of its baseline."""
    values: tuple[float, float]
    intervals: tuple[tuple[float | None, float | None], tuple[float | None, float | None]]
    """95 %."""
    difference: tuple[float, float | None, float | None]
    """The method less its baseline, with its interval; of the same prompts and seeds."""
    better: str
    """Which of the two, if it is no chance."""
    seconds: tuple[float, float]
    """Of training, times devices; 0 where there was none."""
    weights: tuple[int, int]
    """Bytes that were published; 0 where nothing was."""
    moved: tuple[tuple[float, float, float], ...] = ()
    """Of edits by both: how far what should have stayed is from what it was, see `Edited`."""
    drawing: tuple[float, float] | None = None
    """Seconds that a picture takes here, drawn as it was measured; None where none is drawn."""


def bench_transfer(out: Path, only: Collection[str] = (), progress: Progress = quiet) -> list[Row]:
    """Train and measure both sides of every comparison. What an earlier call in this folder did is not done again.

    Args:
        out: Folder of all that is made.
        only: Names of comparisons; none: all.
        progress: Is called as it goes on.

    Raises:
        UserError: there is no such comparison, or the folder cannot be written.
    """
    known = [one.name for one in COMPARISONS]
    if unknown := [name for name in only if name not in known]:
        raise UserError(f"--only: {unknown[0]}: expected some of {', '.join(known)}")
    out = out.absolute()
    rows = []
    with session():
        for one in COMPARISONS:
            if not only or one.name in only:
                rows.append(measure(one, out, progress))
                (out / RESULT).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    return rows


def measure(one: Comparison, out: Path, progress: Progress) -> Row:
    """Both sides of one."""
    found, edited, drawn, costs, sizes, arms = [], [], [], [], [], []
    for number, (side, arm) in enumerate((("method", one.method), ("baseline", one.baseline))):
        own = {one.recipe: f"{one.name}-{side}"} if arm.is_trained else {}
        wanted = {recipe: f"apart-{recipe}" for recipe in arm.recipes} or own
        adapters = []
        for recipe, name in wanted.items():
            place = out / one.name / side
            begun = () if arm.before is None else (f"tuner.init={train_before(one, arm, place, out, progress)}",)
            asked = open_recipe(replace(one, recipe=recipe), arm, place, out, begun)
            adapters.append(str(train_once(asked, name, progress=progress)))
        judged = open_recipe(one, arm, out / one.name / side, out, one.measured)
        chosen = arm.choose(judged, adapters, progress) if arm.choose else Chosen(adapters)
        arms.append(replace(arm, title=f"{arm.title}: {chosen.told}" if chosen.told else arm.title))
        shelf = Registry(judged.storage.registry)
        cards = [shelf.show(name) for name in chosen.adapters]
        folders = [(shelf.fetch(called(card)), 1.0) for card in cards]
        if one.ways is None:
            templates = [chosen.template]
            found += evaluate(judged, [chosen.adapters or None], templates=templates, progress=progress)
            sampler = sampler_of(card.sampler for card in cards)
            if of_pictures([one.metric]):
                drawn.append(Drawn(judged.model.source, folders, found[-1].sampling, sampler))
        else:
            edited.append(edit_pairs(judged.model.source, folders, one.ways[number], judged.evaluate.samples, progress))
        spent = sum(map(seconds_of, made_of(shelf, chosen.adapters)))
        costs.append(spent if chosen.seconds is None else chosen.seconds)
        sizes.append(sum(file.bytes for card in cards for file in card.files.values()))
    one = replace(one, method=arms[0], baseline=arms[1])
    if edited:
        return edits_row(one, edited[0], edited[1], costs, sizes)
    row = make_row(one, found[0], found[1], costs, sizes)
    if not drawn:
        return row
    method, baseline = seconds_a_picture(drawn)
    return replace(row, drawing=(method, baseline))


def train_before(one: Comparison, arm: Arm, place: Path, out: Path, progress: Progress) -> str:
    """What an arm's model learns first; NAME@VERSION."""
    asked = open_recipe(replace(one, recipe=str(arm.before)), replace(arm, overrides=()), place, out)
    return str(train_once(asked, f"{one.name}-before", progress=progress))


def made_of(shelf: Registry, adapters: Sequence[str]) -> list[Card]:
    """Cards of what was trained for some adapters: of a fused one those that it was made of."""
    cards = [shelf.show(name) for name in adapters]
    return [
        shelf.show(name)
        for card in cards for name in (card.lineage.fusion.adapters if card.lineage.fusion else [called(card)])
    ]  # fmt: skip


def seconds_of(card: Card) -> float:
    """Of training, times devices."""
    return card.training.device_hours * 3600 if card.training else 0.0


def make_row(
    one: Comparison, method: Evaluation, baseline: Evaluation, costs: Sequence[float], sizes: Sequence[int]
) -> Row:  # fmt: skip
    """The row of two evaluations."""
    scores = [evaluation.scores[one.metric] for evaluation in (method, baseline)]
    found = compare_by(one.metric, baseline, method, besides=("template",))
    return _row(one, scores, found, costs, sizes)


def edits_row(
    one: Comparison, method: Edited, baseline: Edited, costs: Sequence[float], sizes: Sequence[int]
) -> Row:  # fmt: skip
    """The row of two ways to edit the same pairs."""
    found = difference(method.right, baseline.right)
    return replace(_row(one, (method.right, baseline.right), found, costs, sizes), moved=(method.moved, baseline.moved))


def _row(
    one: Comparison, scores: Sequence[Score | Estimate], difference: Difference, costs: Sequence[float],
    sizes: Sequence[int],
) -> Row:  # fmt: skip
    better = {None: "cannot be told", 0: "the method", 1: "the baseline"}[difference.better]
    return Row(
        one.name, one.metric, (one.method.title, one.baseline.title), (scores[0].value, scores[1].value),
        ((scores[0].low, scores[0].high), (scores[1].low, scores[1].high)),
        (difference.value, difference.low, difference.high), better, (costs[0], costs[1]), (sizes[0], sizes[1]),
    )  # fmt: skip


def open_recipe(one: Comparison, arm: Arm, model: Path, out: Path, changes: Sequence[str] = ()) -> Recipe:
    """An arm's recipe, with its stores in the folder, measured by the comparison's metric alone."""
    places = [f"storage.{place}={json.dumps(str(out / place))}" for place in ("runs", "cache", "registry")]
    made = []
    if arm.model is not None:
        write_once(model, arm.model)
        made = [f"model.source={json.dumps(str(model))}"]
    own = [f"evaluate.metrics=[{one.metric}]"]
    return load_recipe(RECIPES / f"{one.recipe}.yaml", [*places, *own, *made, *arm.overrides, *changes])


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal."""
    cells = [["kind", "metric", "", "value", "95 % interval", "training", "published", "drawing one"]]
    for row in rows:
        for i, label in enumerate(("method", "baseline")):
            low, high = row.intervals[i]
            cells.append([
                row.comparison if i == 0 else "", row.metric if i == 0 else "", f"{label}: {row.titles[i]}",
                short(row.values[i]), interval(low, high), f"{row.seconds[i]:.0f} s" if row.seconds[i] else "none",
                f"{row.weights[i] / 1e6:.2g} MB" if row.weights[i] else "nothing",
                f"{row.drawing[i]:.2g} s" if row.drawing else "",
            ])  # fmt: skip
        for i, (away, low, high) in enumerate(row.moved):
            label = ("method", "baseline")[i]
            cells.append(["", "", f"{label}: moved of what should stay", short(away), interval(low, high), "", "", ""])
        value, low, high = row.difference
        cells.append(["", "", f"difference; better: {row.better}", f"{value:+.3g}", interval(low, high), "", "", ""])
    return columns(cells)
