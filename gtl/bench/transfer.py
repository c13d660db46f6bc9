"""What each kind of transfer is worth: the method beside its proper baseline, on the same images and steps."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gtl.adapters import Card, Registry
from gtl.adapters.fuse import called
from gtl.bench.choosing import Choose, Chosen, best_alone, best_kind, best_wording, in_one, worded
from gtl.bench.editing import BEGUN, INSTRUCTED, INVERTED, Edited, Way, edit_pairs
from gtl.config import Recipe, load_recipe
from gtl.data.scenes.vocabulary import SHAPES
from gtl.data.scenes.words import vocabulary
from gtl.evaluate.estimate import Difference, Estimate, difference
from gtl.evaluate.result import Evaluation, Score, compare
from gtl.evaluate.run import evaluate
from gtl.families.blank import forget
from gtl.families.deepfloyd_blank import write_cascade
from gtl.families.files import write_once
from gtl.families.shrink import shrink
from gtl.features.heads import make_heads
from gtl.report.chart import short
from gtl.report.evaluations import interval
from gtl.report.text import columns
from gtl.session import session
from gtl.train.launch import train_once
from gtl.types import Progress, UserError, quiet

SCENES = "builtin:scenes?count=1000"
"""That recipes/demo/heads.yaml learns from."""
RECIPES = Path(__file__).parents[1] / "recipes" / "demo"
RESULT = "transfer.json"


@dataclass(frozen=True)
class Arm:
    """One side of a comparison."""

    title: str
    overrides: tuple[str, ...] = ()
    """`key=value` for the recipe."""
    model: Callable[[Path], None] | None = None
    """Makes what is trained, in a folder; None: what the recipe says."""
    before: str | None = None
    """In gtl/recipes/demo: what the model learns first, of the data that stands there."""
    is_trained: bool = True
    """False: the recipe's model as it is."""
    recipes: tuple[str, ...] = ()
    """In gtl/recipes/demo: trained apart in place of the comparison's, their adapters all active at once."""
    choose: Choose | None = None
    """What of the trained is measured, and in which words; None: all of them at once, the prompts as they are."""


@dataclass(frozen=True)
class Comparison:
    """A kind of transfer, and what it has to be better than."""

    name: str
    recipe: str
    """In gtl/recipes/demo."""
    metric: str
    method: Arm
    baseline: Arm
    measured: tuple[str, ...] = ()
    """`key=value` for the recipe when its pictures are measured, where that is not on the images of training."""
    ways: tuple[Way, Way] | None = None
    """How pairs of scenes are edited by the method and by its baseline, where that is what is compared."""


FROM_NOTHING = ("model.weights=random", "tuner={type: full, train: [unet, text_encoder]}")


BOTH = (
    "data.source=builtin:scenes?concept=blick&style=neon&count=128&seed=1", "evaluate.samples=128",
    "evaluate.guidance=3.0",
)  # fmt: skip
"""Prompts of both, in nobody's training pictures: the concept's are in no style, and the style's of no concept."""
WORD = (
    "evaluate.samples=128", "evaluate.steps=12", "evaluate.guidance=3.0",
    "evaluate.prompts=" + json.dumps([
        "on a white background: a large red", "gradient green background, a large pink", "white background, a cyan",
        "yellow background, a large blue", "on a gradient blue background: a yellow", "gray background, a small orange",
        "on a green background: a small purple", "on a black background: a green",
    ]),
)  # fmt: skip
"""Prompts to which the name of a thing is missing."""
KNOWN_WORD = Arm(
    "the known word for it that draws best", WORD, is_trained=False,
    choose=best_wording([f"{{}} {shape}" for shape in SHAPES]),
)  # fmt: skip
THINGS = ("data.source=builtin:scenes?concept=blick&count=256&seed=1",)
"""Pictures of it that nothing was learned from."""


NEON_STAGE = (
    "data.source=builtin:scenes?style=neon&count=32", "data.validation=0.25", "train.steps=80",
    "train.checkpoints.every=80", "evaluate.every=80",
)  # fmt: skip
"""Of which a quarter is held out."""


def first_stage(folder: Path) -> None:
    """The first stage of the demo's cascade, which has learned nothing."""
    with tempfile.TemporaryDirectory() as both:
        write_cascade(Path(both), vocabulary())
        shutil.copytree(Path(both) / "first", folder, dirs_exist_ok=True)


def cut(folder: Path) -> None:
    """The built-in model without the middle of its UNet."""
    shrink("builtin:tiny", folder, drop_middle=True)


def heads_on(
    source: str, forgets: bool = False, task: str = "shape", part: str | None = None
) -> Callable[[Path], None]:
    """A model with a head for the shapes of the built-in scenes, or the same with random weights under it.

    `part`: a text encoder of it, whose head reads their captions.
    """

    def make(folder: Path) -> None:
        beside = folder.with_name(f"{folder.name}-base")
        if forgets:
            write_once(beside, lambda blank: forget(source, blank))
        base, cache = str(beside) if forgets else source, str(folder.parents[1] / "cache")
        make_heads(base, SCENES, [task], folder, cache, part=part)

    return make


COMPARISONS = (
    Comparison(
        "freeze", "frozen", "prompt_accuracy",
        Arm("early blocks and text encoder frozen"), Arm("the same network from random weights", FROM_NOTHING),
    ),
    Comparison(
        "freeze-or-all", "frozen", "prompt_accuracy",
        Arm("early blocks and text encoder frozen"),
        Arm("every weight moves", ("tuner={type: full, train: [unet, text_encoder]}",)),
    ),
    Comparison(
        "lora", "study", "prompt_accuracy",
        Arm("LoRA of a new concept"), Arm("the same network from random weights", FROM_NOTHING),
    ),
    Comparison(
        "strategy", "study", "prompt_accuracy",
        Arm("the kind of transfer that a study chooses", is_trained=False, choose=best_kind),
        Arm("LoRA, as the recipe says"),
    ),
    Comparison(
        "few-steps", "few_steps", "prompt_accuracy",
        Arm("drawn in 2 steps, consistency LoRA"), Arm("the model alone in 2 steps", is_trained=False),
    ),
    Comparison(
        "one-step", "one_step", "prompt_accuracy",
        Arm("drawn in 1 step, consistency LoRA that is judged"),
        Arm("the same one that nobody judges", ("objective.adversarial=0",)),
    ),
    Comparison(
        "student", "student", "prompt_accuracy",
        Arm("distilled into three quarters of the weights", model=cut),
        Arm("the same one from random weights", ("objective={type: denoise}", "model.weights=random"), cut),
    ),
    Comparison(
        "adapt", "adapt", "prompt_accuracy",
        Arm("a style of 12 pictures, domains aligned"),
        Arm("plain fine-tuning on the same pictures", ("objective={type: denoise}",)),
    ),
    Comparison(
        "codec", "codec", "val_loss",
        Arm("a codec taught to keep chalk lines"), Arm("the same one from random weights", ("model.weights=random",)),
    ),
    Comparison(
        "cascade", "cascade", "val_loss",
        Arm("a cascade's first stage, taught a style of 24 pictures", NEON_STAGE, first_stage, before="cascade"),
        Arm("the same one from random weights", NEON_STAGE, first_stage),
    ),
    Comparison(
        "gan", "gan", "kid",
        Arm("a GAN fine-tuned to 100 pictures"), Arm("the same one from random weights", ("model.weights=random",)),
        ("data.source=builtin:scenes?style=neon&count=256&size=32&seed=1",),
    ),
    Comparison(
        "with-style", "concept", "prompt_accuracy",
        Arm("a concept and a style, trained apart", recipes=("concept", "style")),
        Arm("the concept alone", recipes=("concept",)), BOTH,
    ),
    Comparison(
        "with-concept", "style", "prompt_accuracy",
        Arm("a style and a concept, trained apart", recipes=("concept", "style")),
        Arm("the style alone", recipes=("style",)), BOTH,
    ),
    Comparison(
        "fusion", "concept", "prompt_accuracy",
        Arm("both in one LoRA of their rank", recipes=("concept", "style"), choose=in_one),
        Arm("the better of the two alone", recipes=("concept", "style"), choose=best_alone), BOTH,
    ),
    Comparison(
        "words", "word", "kid",
        Arm("a learned word for a thing", WORD, choose=worded("{} <blick>")), KNOWN_WORD, THINGS,
    ),
    Comparison(
        "words-and-weights", "pivotal", "kid",
        Arm("a word for a thing and a LoRA, learned at once", WORD, choose=worded("{} <blick>")), KNOWN_WORD, THINGS,
    ),
    Comparison(
        "instruct", "instruct", "prompt_accuracy",
        Arm("edits, told what to change"), Arm("image to image, told all that is to be seen", is_trained=False),
        ways=(INSTRUCTED, BEGUN),
    ),
    Comparison(
        "inversion", "instruct", "prompt_accuracy",
        Arm("edits by inversion", is_trained=False), Arm("image to image, of the same strength", is_trained=False),
        ways=(INVERTED, BEGUN),
    ),
    Comparison(
        "features", "heads", "accuracy",
        Arm("a head on features of the frozen diffusion model", model=heads_on("builtin:tiny")),
        Arm("a head on the same model with random weights", model=heads_on("builtin:tiny", forgets=True)),
    ),
    Comparison(
        "captions", "text_heads", "accuracy",
        Arm("a head on the frozen text encoder", model=heads_on("builtin:tiny", False, "colour", "text_encoder")),
        Arm("a head on it with random weights", model=heads_on("builtin:tiny", True, "colour", "text_encoder")),
    ),
    Comparison(
        "pixels", "heads", "accuracy",
        Arm("a head on features of the frozen diffusion model", model=heads_on("builtin:tiny")),
        Arm("a head on a picture's own pixels", model=heads_on("builtin:pixels")),
    ),
)  # fmt: skip


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
    found, edited, costs, sizes, arms = [], [], [], [], []
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
        if one.ways is None:
            templates = [chosen.template]
            found += evaluate(judged, [chosen.adapters or None], templates=templates, progress=progress)
        else:
            folders = [(shelf.fetch(adapter), 1.0) for adapter in chosen.adapters]
            edited.append(edit_pairs(judged.model.source, folders, one.ways[number], judged.evaluate.samples, progress))
        spent = sum(map(seconds_of, made_of(shelf, chosen.adapters)))
        costs.append(spent if chosen.seconds is None else chosen.seconds)
        sizes.append(sum(file.bytes for name in chosen.adapters for file in shelf.show(name).files.values()))
    one = replace(one, method=arms[0], baseline=arms[1])
    if edited:
        return edits_row(one, edited[0], edited[1], costs, sizes)
    return make_row(one, found[0], found[1], costs, sizes)


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
    (found,) = (each for each in compare(baseline, method, besides=("template",)) if each.metric == one.metric)
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
    cells = [["kind", "metric", "", "value", "95 % interval", "training", "published"]]
    for row in rows:
        for i, label in enumerate(("method", "baseline")):
            low, high = row.intervals[i]
            cells.append([
                row.comparison if i == 0 else "", row.metric if i == 0 else "", f"{label}: {row.titles[i]}",
                short(row.values[i]), interval(low, high), f"{row.seconds[i]:.0f} s" if row.seconds[i] else "none",
                f"{row.weights[i] / 1e6:.2g} MB" if row.weights[i] else "nothing",
            ])  # fmt: skip
        for i, (away, low, high) in enumerate(row.moved):
            label = ("method", "baseline")[i]
            cells.append(["", "", f"{label}: moved of what should stay", short(away), interval(low, high), "", ""])
        value, low, high = row.difference
        cells.append(["", "", f"difference; better: {row.better}", f"{value:+.3g}", interval(low, high), "", ""])
    return columns(cells)
