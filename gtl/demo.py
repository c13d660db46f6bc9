"""`gtl demo`: what transfer learning does, shown on this machine, with pictures and honest numbers.

Two adapters learn a concept and a style that the built-in model has never met, from 24 pictures each, with pictures of
its own training among them, so that what it could do stays. Beside them the same network learns from the same pictures,
but from random weights. All of them draw prompts that none was trained on.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gtl.config import Recipe, load_recipe
from gtl.config.load import read_yaml
from gtl.data.scenes.sets import SceneSet
from gtl.evaluate.scenes import Drawing, Score, draw, new_prompts, score
from gtl.families import open_family
from gtl.families.blank import forget
from gtl.families.files import write_once
from gtl.generate.spread import Published
from gtl.images import decode, grid
from gtl.report.demo import Panel, render_demo
from gtl.report.text import columns
from gtl.session import session
from gtl.train.launch import train_once
from gtl.types import Progress, UserError, quiet

RECIPES = Path(__file__).parent / "recipes" / "demo"
ADAPTERS = ("concept", "style")
SCRATCH = "scratch"
BASE = "base"
OLD = "old"
GUIDANCE = 3.0
SHOWN = 8
"""Pictures of each model on the page, for each kind of prompt."""
GOALS = {"new": 0.8, "kept": 0.85}
"""Share of new prompts that an adapter should draw right; share of the base's old skill that it should keep."""
RESULT = "demo.json"
PAGE = "demo.html"
GRID = "grid.png"


@dataclass(frozen=True)
class Kind:
    """One kind of prompts."""

    name: str
    title: str
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What the demo measured and wrote."""

    scores: dict[str, dict[str, Score]]
    """Kind of prompts -> model -> score."""
    seconds: dict[str, float]
    """Training time of each model that was trained in this call, start-up of workers included."""
    page: Path

    def kept(self, adapter: str) -> float:
        """Right pictures of old prompts with an adapter, as a share of the base's."""
        old = self.scores[OLD]
        return old[adapter].share / old[BASE].share if old[BASE].right else 0.0


def demo(out: Path, overrides: Sequence[str] = (), prompts: int = 60, progress: Progress = quiet) -> Outcome:
    """Train, draw, judge, write the page. What an earlier call with the same settings did is not done again.

    Args:
        out: Folder of everything the demo writes.
        overrides: `key=value` for all recipes.
        prompts: Prompts of each kind.
        progress: Is called as it goes on.

    Raises:
        UserError: an override is wrong, or the folder cannot be written.
    """
    if prompts < 1:
        raise UserError(f"--prompts: {prompts}: expected 1 or more")
    out = out.absolute()
    recipes = {name: open_recipe(name, out, overrides) for name in ADAPTERS}
    source = recipes[ADAPTERS[0]].model.source
    # Named after what it was made of, so that a newer model in the box gets a newer one.
    blank = out / f"blank-{open_family(source).fingerprint()[:8]}"
    write_once(blank, lambda folder: forget(source, folder))
    steps = sum(recipe.train.steps or 0 for recipe in recipes.values())
    own = [f"model.source={json.dumps(str(blank))}", f"train.steps={steps}"]
    recipes[SCRATCH] = open_recipe(SCRATCH, out, [*overrides, *own])
    seconds: dict[str, float] = {}
    adapters: dict[str, Published] = {}
    with session():
        for name, recipe in recipes.items():
            started = time.monotonic()
            published = train_once(recipe, f"demo-{name}", progress=progress)
            seconds[name] = time.monotonic() - started
            adapters[name] = Published(recipe.storage.registry, str(published))
        kinds = choose_prompts(prompts)
        drawings = plan(kinds, source, str(blank), adapters, out)
        draw([drawing for by_model in drawings.values() for drawing in by_model.values()], progress)
    progress("judge", 0, 0)
    scores = {kind: {model: score(d) for model, d in by_model.items()} for kind, by_model in drawings.items()}
    outcome = Outcome(scores, seconds, out / PAGE)
    write(outcome, kinds, drawings, recipes, out)
    return outcome


def open_recipe(name: str, out: Path, overrides: Sequence[str]) -> Recipe:
    """One of the demo's recipes, with its stores inside the demo's folder."""
    places = [f"storage.{place}={json.dumps(str(out / place))}" for place in ("runs", "cache", "registry")]
    return load_recipe(RECIPES / f"{name}.yaml", [*places, *overrides])


def choose_prompts(number: int) -> tuple[Kind, ...]:
    """Prompts that are in nobody's training pictures: of the concept, of the style, and of what the base could do."""
    kinds = []
    for name in ADAPTERS:
        new, _ = read_yaml((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))["data"]["source"]
        seen = SceneSet.parse(new["source"])
        known = {seen.caption(index) for index in range(seen.count)}
        unseen = SceneSet(concept=seen.concept, style=seen.style, seed=1)
        thing = f"new concept: {seen.concept}" if seen.concept else f"new style: {seen.style}"
        kinds.append(Kind(name, thing, new_prompts(unseen, number, known)))
    old = SceneSet(split="heldout", seed=1)
    return (*kinds, Kind(OLD, "old skill: shapes and colours never shown together", new_prompts(old, number)))


def plan(
    kinds: Sequence[Kind], source: str, blank: str, adapters: dict[str, Published], out: Path
) -> dict[str, dict[str, Drawing]]:
    """Kind of prompts -> model -> what it is to draw. An adapter draws its own kind and the old one."""

    def drawing(kind: Kind, model: str) -> Drawing:
        base = blank if model == SCRATCH else source
        chosen = () if model == BASE else (adapters[model],)
        return Drawing(out / "pictures" / kind.name / model, base, kind.prompts, chosen, guidance=GUIDANCE)

    models = {kind.name: (BASE, *((kind.name,) if kind.name in ADAPTERS else ADAPTERS), SCRATCH) for kind in kinds}
    return {kind.name: {model: drawing(kind, model) for model in models[kind.name]} for kind in kinds}


def write(
    outcome: Outcome, kinds: Sequence[Kind], drawings: dict[str, dict[str, Drawing]], recipes: dict[str, Recipe],
    out: Path,
) -> None:  # fmt: skip
    """The numbers, a grid of pictures, and the page."""
    values = {
        "scores": {
            kind: {
                model: {"right": s.right, "of": s.total, "interval": list(s.interval), "claims": s.claims}
                for model, s in by_model.items()
            }
            for kind, by_model in outcome.scores.items()
        },
        "kept": {name: outcome.kept(name) for name in ADAPTERS},
        "goals": GOALS,
        "seconds": outcome.seconds,
    }  # fmt: skip
    (out / RESULT).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    rows = [drawing for by_model in drawings.values() for drawing in by_model.values()]
    shown = min(SHOWN, len(kinds[0].prompts))
    images = [decode(drawing.file(i)) for drawing in rows for i in range(shown)]
    grid(images, shown).save(out / GRID)
    panels = [
        Panel(
            kind.title, kind.prompts[:shown],
            {label(model): [d.file(i) for i in range(shown)] for model, d in drawings[kind.name].items()},
        )
        for kind in kinds
    ]  # fmt: skip
    steps = {label(name): recipe.train.steps or 0 for name, recipe in recipes.items()}
    page = render_demo(table(outcome, kinds), panels, steps, outcome.seconds, next_commands(out))
    outcome.page.write_text(page, encoding="utf-8")


def label(model: str) -> str:
    """A model's name on the page."""
    return {BASE: "the base model", SCRATCH: "from scratch"}.get(model, f"with the {model} adapter")


def table(outcome: Outcome, kinds: Sequence[Kind]) -> list[dict[str, str]]:
    """The scores for people to read, a row a model and a kind of prompts."""
    rows = []
    for kind in kinds:
        for model, found in outcome.scores[kind.name].items():
            low, high = found.interval
            goal = ""
            if model in ADAPTERS:
                is_new = kind.name == model
                value, wanted = (found.share, GOALS["new"]) if is_new else (outcome.kept(model), GOALS["kept"])
                goal = f"{value:.0%}{'' if is_new else ' of the base'}, goal {wanted:.0%}"
                goal += ": reached" if value >= wanted else ": missed"
            rows.append({
                "prompts": kind.title, "drawn by": label(model), "right": f"{found.right} of {found.total}",
                "95 % interval": f"{low:.0%} to {high:.0%}", "goal": goal,
            })  # fmt: skip
    return rows


def summary(outcome: Outcome) -> str:
    """The table for a terminal."""
    kinds = [Kind(name, name, ()) for name in outcome.scores]
    rows = table(outcome, kinds)
    return columns([list(rows[0]), *(list(row.values()) for row in rows)])


def next_commands(out: Path) -> list[str]:
    """What to type now."""
    registry = shlex.quote(str(out / "registry"))
    return [
        f"gtl generate --registry {registry} --adapter demo-concept --prompt 'a large red blick on a blue background'"
        " --guidance 3 --out pictures",
        f"gtl generate --registry {registry} --adapter demo-concept --adapter demo-style"
        " --prompt 'a neon sign of a green blick' --guidance 3 --out both",
        f"gtl adapters list --registry {registry}",
        "gtl init FOLDER_OF_YOUR_IMAGES",
    ]
