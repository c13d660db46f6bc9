"""Looks of a run that are scored by the pictures they draw: in turn with training, and beside it on CPUs left free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gtl.adapters import Registry
from gtl.config import Recipe, parse_recipe
from gtl.evaluate.result import Evaluation
from gtl.evaluate.run import evaluate
from gtl.storage import Store
from gtl.train.scores import read_scores, scored
from gtl.types import UserError
from tests.tiny import make_sd, write_pictures

pytestmark = pytest.mark.usefixtures("ray_cluster")
METRICS = ["kid", "diversity", "memorization"]
LOOKS = [0, 3, 6]
Told = list[tuple[Any, ...]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and twelve captioned pictures."""
    folder = tmp_path_factory.mktemp("beside")
    make_sd(folder / "model")
    write_pictures(folder / "images", [(64, 64)] * 12)
    return folder


def make_recipe(place: Path, cpus: float, **train: Any) -> Recipe:
    return parse_recipe({
        "model": {"source": str(place / "model")},
        "tuner": {"type": "lora", "rank": 4, "targets": "all-linear"},
        "data": {"source": str(place / "images"), "resolution": 64, "validation": 0.25},
        "train": {"steps": LOOKS[-1], "batch_size": 4, "learning_rate": 0.05, "workers": 2, "cpus_per_worker": cpus,
                  "checkpoints": {"best": "kid"}, **train},
        "evaluate": {"every": 3, "steps": 2, "seed": 3, "beside": {"metrics": METRICS, "samples": 9},
                     "prompts": ["a photo of a dog", "two unknown words"]},
        "storage": {name: str(place / name) for name in ("runs", "cache", "registry")},
    })  # fmt: skip


def run(recipe: Recipe, name: str) -> tuple[Store, Told]:
    """A run's folder, and what it told."""
    from gtl.train.launch import train

    told: Told = []
    published = train(recipe, name, progress=lambda *row: told.append(row))
    return Store(f"{recipe.storage.runs}/{name}/{published.version}"), told


@pytest.fixture(scope="module")
def in_turn(place: Path) -> tuple[Store, Told]:
    """Two workers that take all three CPUs."""
    return run(make_recipe(place, 1.5), "turn")


@pytest.fixture(scope="module")
def beside(place: Path) -> tuple[Store, Told]:
    """Two workers that leave one."""
    return run(make_recipe(place, 1), "beside")


def rows_of(folder: Store) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.read("metrics.jsonl").decode().splitlines()]


def curve_of(folder: Store, key: str) -> list[tuple[int, float]]:
    """(step, kid) as TensorBoard shows it."""
    found = EventAccumulator(folder.url(key)).Reload()
    return [(event.step, event.value) for event in found.Scalars("kid")] if "kid" in found.Tags()["scalars"] else []


def test_workers_score_their_looks_in_turn_and_say_so(place: Path, in_turn: tuple[Store, Told]) -> None:
    folder, told = in_turn
    said = "kid, diversity, memorization: in turn with training, which leaves no CPU free; train.workers says how many"
    assert ("score", 0, 0, said) in told
    looks = {int(row["step"]): row for row in rows_of(folder) if "kid" in row}
    assert list(looks) == scored(folder) == LOOKS
    for step, row in looks.items():
        assert read_scores(folder, step) == {name: row[name] for name in METRICS}
    assert [step for step, _ in curve_of(folder, "tensorboard")] == LOOKS
    assert folder.folders("tensorboard") == []
    evaluation = Evaluation.model_validate_json(folder.read("scores/00000003.json"))
    assert (evaluation.step, evaluation.samples, evaluation.images, evaluation.held_out) == (3, None, 12, 3)
    assert evaluation.title == f"turn@{folder.url().rpartition('/')[2]} after 3 steps"
    assert {(score.num_fake, score.extractor) for score in evaluation.scores.values()} == {(9, "builtin:backbone")}
    assert folder.read("scores/00000003.png").startswith(b"\x89PNG")


def test_the_best_weights_are_published_with_what_they_were_chosen_by(place: Path, in_turn: tuple[Store, Told]) -> None:
    folder, _ = in_turn
    card = Registry(place / "registry").show("turn")
    assert card.training is not None and card.training.best_step is not None
    best = min(LOOKS[1:], key=lambda step: read_scores(folder, step)["kid"])
    assert (card.training.best_step, card.training.scores) == (best, {"kid": read_scores(folder, best)["kid"]})
    assert not {"best", "candidates"} & set(folder.folders()), "what was kept meanwhile is gone"


def test_what_is_scored_beside_training_is_what_is_scored_in_turn(
    place: Path, in_turn: tuple[Store, Told], beside: tuple[Store, Told]
) -> None:
    folder, told = beside
    assert scored(folder) == LOOKS
    assert not [row for row in rows_of(folder) if "kid" in row], "training waited for none of them"
    kids = [(step, pytest.approx(read_scores(folder, step)["kid"], rel=1e-6)) for step in LOOKS]
    assert (curve_of(folder, "tensorboard"), curve_of(folder, "tensorboard/scores")) == ([], kids)
    said = [row[3] for row in told if row[0] == "score" and len(row) > 3 and "kid" in row[3]]
    assert {text.split()[1] for text in said} <= {str(step) for step in LOOKS}
    for step in LOOKS:
        for name, value in read_scores(in_turn[0], step).items():
            assert read_scores(folder, step)[name] == pytest.approx(value, rel=1e-3, abs=1e-6), (step, name)
    cards = [Registry(place / "registry").show(name) for name in ("turn", "beside")]
    steps = [card.training.best_step for card in cards if card.training is not None]
    assert steps[0] == steps[1]
    assert not {"best", "candidates"} & set(folder.folders())


def test_evaluating_what_was_published_gives_the_loss_that_its_run_reported(
    place: Path, in_turn: tuple[Store, Told]
) -> None:
    values = make_recipe(place, 1.5).model_dump(mode="json")
    values["evaluate"] |= {"metrics": ["val_loss"]}
    phases = []
    found = evaluate(parse_recipe(values), [None, "turn"], progress=lambda phase, *_: phases.append(phase))
    card = Registry(place / "registry").show("turn")
    assert card.training is not None
    rows = {row["step"]: row for row in rows_of(in_turn[0])}
    for evaluation, step in zip(found, (0, card.training.best_step), strict=True):
        score = evaluation.scores["val_loss"]
        reported = {name: value for name, value in rows[step].items() if name.startswith("val_loss")}
        assert len(reported) == 5
        assert {"val_loss": score.value, **score.parts} == pytest.approx(reported, rel=1e-5)
        assert (score.num_fake, score.num_real, score.low, score.higher_is_better) == (0, 3, None, False)
        assert (evaluation.samples, evaluation.sampling.prompts) == (None, [])
    assert found[0].scores["val_loss"].value > 1.05 * found[1].scores["val_loss"].value
    assert set(phases) == {"model", "val_loss"}, "nothing is drawn, and everything was encoded for the run"


@pytest.mark.parametrize("cpus", [1.5, pytest.param(1, marks=pytest.mark.soak)])
def test_a_run_stops_when_its_pictures_get_no_better(place: Path, cpus: float) -> None:
    stopping = {"metric": "diversity", "patience": 1, "min_delta": 10}
    recipe = make_recipe(place, cpus, steps=400, checkpoints={"every": 1000}, early_stopping=stopping)
    folder, _ = run(recipe, "stopped")
    card = Registry(place / "registry").show("stopped")
    assert card.training is not None
    assert (card.training.best_step, list(card.training.scores)) == (3, ["diversity"])
    assert card.training.steps == 6 if cpus > 1 else 6 <= card.training.steps < 400
    assert json.loads(folder.read("result.json"))["best_step"] == 3


@pytest.mark.soak
def test_a_backbone_that_is_not_there_ends_the_run_with_one_line(place: Path) -> None:
    values = make_recipe(place, 1).model_dump(mode="json")
    values["train"] |= {"steps": 100000}
    values["evaluate"]["backbone"] = "/nowhere"
    with pytest.raises(UserError, match=r"^/nowhere") as caught:
        run(parse_recipe(values), "nowhere")
    assert "\n" not in str(caught.value)
