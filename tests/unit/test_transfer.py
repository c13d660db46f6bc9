"""The table of what each kind of transfer is worth: every row can be made, and says what was measured."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gtl.adapters import Card, Registry
from gtl.adapters.card import Base, Fusion, Lineage, Training
from gtl.bench.choosing import Chosen, apart, told_of
from gtl.bench.comparisons import COMPARISONS, Comparison
from gtl.bench.editing import BEGUN, PAIRS, Edited, describe, describe_before, distance, edit_pairs
from gtl.bench.pace import Drawn, seconds_a_picture
from gtl.bench.transfer import (
    RECIPES,
    edits_row,
    made_of,
    make_row,
    open_recipe,
    seconds_of,
    table,
)
from gtl.config import load_recipe
from gtl.data.scenes.captions import read_caption
from gtl.evaluate.estimate import Estimate, estimate_share
from gtl.evaluate.result import Evaluation, Sampling, make_score
from gtl.families import open_family
from gtl.search.study import FRESH
from gtl.types import quiet

FACTS = {"extractor": "reader", "resize": "none", "dtype": "exact"}


@pytest.mark.parametrize("one", COMPARISONS, ids=lambda one: one.name)
def test_both_sides_are_measured_alike(one: Comparison, tmp_path: Path) -> None:
    method, baseline = (
        open_recipe(one, arm, tmp_path / side, tmp_path)
        for side, arm in (("method", one.method), ("baseline", one.baseline))
    )
    assert method.evaluate == baseline.evaluate and method.data == baseline.data
    assert method.evaluate.metrics == [one.metric]
    assert method.storage.registry == str(tmp_path / "registry")
    if one.baseline.is_trained:
        assert method.train == baseline.train, "the same steps, batches and rate"
    known = ("sd", "gan", "classifier", "diffusion_classifier", "text_classifier", "deepfloyd")
    for recipe in (method, baseline):
        assert open_family(recipe.model.source).name in known
    judged = open_recipe(one, one.method, tmp_path / "method", tmp_path, one.measured)
    assert (judged.data.source != method.data.source) == bool(one.measured)


def evaluation(adapter: str | None, right: list[float]) -> Evaluation:
    rows = torch.tensor(right, dtype=torch.float64)
    share = float(rows.mean())
    estimate = Estimate("prompt_accuracy", share, share - 0.1, share + 0.1, rows - share, None, 0, "")
    how = Sampling(prompts=["a"], negative_prompt="", seed=0, steps=2, guidance=3.0, height=64, width=64, dtype="fp32")
    return Evaluation(
        adapter=adapter, base={}, dataset="d", images=1, held_out=0, sampling=how,
        scores={"prompt_accuracy": make_score(estimate, FACTS)}, nearest=[], samples=None,
    )  # fmt: skip


def test_a_row_is_the_method_less_its_baseline() -> None:
    one = COMPARISONS[1]
    method, baseline = evaluation("fast@v1", [1.0] * 90 + [0.0] * 10), evaluation(None, [1.0] * 50 + [0.0] * 50)
    row = make_row(one, method, baseline, (60.0, 0.0), (2_000_000, 0))
    assert row.values == (0.9, 0.5) and row.better == "the method"
    value, low, high = row.difference
    assert value == pytest.approx(0.4) and low is not None and 0 < low < 0.4 < high
    assert make_row(one, baseline, method, (0.0, 60.0), (0, 1)).better == "the baseline"
    assert make_row(one, method, method, (1.0, 1.0), (1, 1)).better == "cannot be told"
    lines = table([row]).splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["kind", one.name]
    assert "60 s" in lines[1] and "2 MB" in lines[1] and "none" in lines[2] and "nothing" in lines[2]
    assert "better: the method" in lines[3] and "+0.4" in lines[3]


def test_a_picture_of_a_row_has_its_time() -> None:
    """Drawn as it was measured: in as many steps, from the same seeds."""
    shown = evaluation(None, [1.0] * 10)
    side = Drawn("builtin:tiny", [], shown.sampling.model_copy(update={"template": "a large {}"}))
    _, asked = side.open()
    assert [(one.prompt, one.steps, one.seed) for one in asked] == [("a large a", 2, seed) for seed in range(8)]
    seconds = seconds_a_picture([side, side])
    assert len(seconds) == 2 and 0 < min(seconds) <= max(seconds) < math.inf
    row = replace(make_row(COMPARISONS[1], shown, shown, (0.0, 0.0), (0, 0)), drawing=(0.25, 1.5))
    lines = table([row]).splitlines()
    assert lines[0].endswith("drawing one") and lines[1].endswith("0.25 s") and lines[2].endswith("1.5 s")


def test_a_row_of_edits_says_what_moved() -> None:
    one = next(one for one in COMPARISONS if one.ways)
    rows = [torch.tensor([float(i < many) for i in range(100)], dtype=torch.float64) for many in (90, 50)]
    method, baseline = (
        Edited(estimate_share("prompt_accuracy", float(row.mean()), row, 100), (moved, moved - 0.01, moved + 0.01))
        for row, moved in zip(rows, (0.02, 0.05), strict=True)
    )
    row = edits_row(one, method, baseline, (60.0, 0.0), (2_000_000, 0))
    assert (row.values, row.better, row.moved) == ((0.9, 0.5), "the method", (method.moved, baseline.moved))
    lines = table([row]).splitlines()
    assert "method: moved of what should stay" in lines[3] and "0.02" in lines[3] and "0.05" in lines[4]


def test_an_edit_is_judged_by_all_that_it_should_show() -> None:
    """One that is drawn as it should be is right and moved nothing; the picture that it began at is not."""
    assert distance(PAIRS.picture(0)[0], 0) < 0.005 and distance(PAIRS.before(0), 0) == 0
    edit, _ = PAIRS.edit(0)
    (old,), (new,) = edit.before.things, edit.after.things
    for scene, words in ((edit.before, describe_before(edit)), (edit.after, describe(edit))):
        claimed = read_caption(words)
        assert claimed.background == scene.background and claimed.things[0].shape == scene.things[0].shape
    assert old != new


def test_pairs_are_edited_by_the_built_in_model() -> None:
    found = edit_pairs("builtin:tiny", (), replace(BEGUN, steps=4), 8, quiet)
    assert 0 <= found.right.value <= 1 and found.right.num_fake == 8
    assert 0 < found.moved[1] < found.moved[0] < found.moved[2] < 0.5


def test_candidates_are_drawn_on_seeds_that_nothing_is_measured_on(tmp_path: Path) -> None:
    one = next(one for one in COMPARISONS if one.name == "words")
    recipe = open_recipe(one, one.baseline, tmp_path, tmp_path, one.measured)
    drawn = apart(recipe)
    seeds = {recipe.evaluate.seed + i for i in range(recipe.evaluate.samples)}
    # A search draws its candidates, and the best of them once more.
    for first in (drawn.evaluate.seed, drawn.evaluate.seed + FRESH):
        assert seeds.isdisjoint(range(first, first + drawn.evaluate.samples))
    assert drawn.evaluate.samples < recipe.evaluate.samples and drawn.data == recipe.data


def test_a_learned_word_is_measured_in_its_own_words() -> None:
    one = next(one for one in COMPARISONS if one.name == "words")
    assert one.method.choose is not None
    recipe = load_recipe(RECIPES / "word.yaml")
    chosen = one.method.choose(recipe, ["word@v1"], quiet)
    assert chosen == Chosen(["word@v1"], f"{{}} {recipe.tuner.token}")  # type: ignore[union-attr]
    other = evaluation("word@v1", [1.0] * 10)
    worded = other.model_copy(update={"sampling": other.sampling.model_copy(update={"template": chosen.template})})
    assert make_row(COMPARISONS[0], worded, evaluation(None, [0.0] * 10), (1, 0), (1, 0)).better == "the method"


def test_what_is_fused_costs_what_was_trained_for_it(tmp_path: Path) -> None:
    shelf = Registry(tmp_path / "registry")
    base = Base(source="builtin:tiny", fingerprint="f" * 64, family="sd")
    fused = Lineage(fusion=Fusion(method="svd", adapters=["dog@v1", "neon@v1"], weights=[1.0, 0.5]))
    for name, hours, lineage in (("dog", 0.5, Lineage()), ("neon", 0.25, Lineage()), ("both", None, fused)):
        (folder := tmp_path / name).mkdir()
        (folder / "weights").write_text(name)
        training = None if hours is None else Training(steps=1, device_hours=hours)
        shelf.publish(name, "v1", folder, Card(
            name=name, version="v1", base=base, tuner={}, training=training, lineage=lineage,
        ))  # fmt: skip
    spent = [sum(map(seconds_of, made_of(shelf, [name]))) for name in ("dog@v1", "both@v1")]
    assert spent == [1800, 2700]
    assert sum(map(seconds_of, made_of(shelf, ["dog@v1", "neon@v1"]))) == 2700
    assert told_of((0.5, 1.25)) == "0.5 + 1.25"
