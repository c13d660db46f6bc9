"""Heads from `gtl train` to `gtl evaluate`: two workers, a network that learns too and one that is frozen."""

import json
from pathlib import Path
from typing import Any

import pytest

from gtl.adapters import Registry
from gtl.config import Recipe, parse_recipe
from gtl.evaluate.run import evaluate
from gtl.features.heads import make_heads
from gtl.features.say import say
from tests.tiny import make_sd, make_vision

pytestmark = pytest.mark.usefixtures("ray_cluster")
DATA = "builtin:scenes?count=60&seed=3"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    resnet = str(make_vision(folder / "resnet", "resnet"))
    for name, source in (("frozen", "builtin:backbone"), ("learning", resnet)):
        make_heads(source, DATA, ["size", "boxes"], folder / name, str(folder / "cache"))
    return folder


def make_recipe(place: Path, model: str, tuner: str, **train: Any) -> Recipe:
    return parse_recipe({
        "model": {"source": str(place / model)},
        "tuner": {"type": tuner},
        "objective": {"type": "classify", "weights": {"boxes": 0.1}},
        "data": {"source": DATA, "resolution": 64, "buckets": False, "validation": 0.4},
        "train": {"steps": 8, "batch_size": 8, "micro_batch": 4, "learning_rate": 1e-2, "workers": 2,
                  "checkpoints": {"every": 4, "best": "accuracy"}, **train},
        "evaluate": {"every": 4, "metrics": ["accuracy", "map_50", "val_loss"]},
        "storage": {name: str(place / name) for name in ("runs", "cache", "registry")},
    })  # fmt: skip


@pytest.mark.parametrize(("model", "tuner"), [("frozen", "head"), ("learning", "full")])
def test_heads_are_trained_measured_and_used(place: Path, model: str, tuner: str) -> None:
    from gtl.train.launch import train

    train(make_recipe(place, model, tuner), model)
    (file,) = (place / "runs" / model).glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    looks = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in looks] == [0, 4, 8]
    assert all(0 <= row[name] <= 1 for row in looks for name in ("accuracy", "map_50"))
    assert all(row["size_error"] > 0 and row["boxes_error"] > 0 for row in rows if "loss" in row)

    card = Registry(place / "registry").show(model)
    assert (card.kind, card.objective["type"], card.tuner["type"]) == ("delta", "classify", tuner)
    assert card.training is not None and card.training.scores.keys() >= {"accuracy"}
    best = max(row["accuracy"] for row in looks[1:])
    assert card.training.scores["accuracy"] == best

    (found,) = evaluate(make_recipe(place, model, tuner), [model])
    assert found.scores.keys() == {"accuracy", "map_50", "val_loss"}
    accuracy = found.scores["accuracy"]
    assert accuracy.value == pytest.approx(best, abs=1e-6) and accuracy.num_real == len(accuracy.real or [])
    # Of all right the upper end is 1.
    assert accuracy.low is not None and accuracy.low < accuracy.value <= (accuracy.high or 0) <= 1

    picture = next(path for path in (place / "cache" / "scenes").rglob("000000.png"))
    said = {each.task: each.answers for each in say([str(picture)], model, str(place / "registry"))}
    assert said.keys() == {"size", "boxes"} and {answer.label for answer in said["size"]} == {"large", "small"}


def test_heads_that_read_are_trained_measured_and_used(place: Path) -> None:
    """On captions of the same pictures, by two workers; of a text encoder with random weights, which tells words."""
    from gtl.train.launch import train

    make_sd(place / "sd")
    make_heads(str(place / "sd"), DATA, ["objects"], place / "reading", str(place / "cache"), part="text_encoder")
    values = make_recipe(place, "reading", "head", steps=40).model_dump(mode="json")
    values["objective"] = {"type": "classify"}
    values["evaluate"] |= {"every": 40, "metrics": ["accuracy", "val_loss"]}
    recipe = parse_recipe(values)
    train(recipe, "reading")
    card = Registry(place / "registry").show("reading")
    assert (card.kind, card.base.family, card.tuner["type"]) == ("delta", "text_classifier", "head")
    (found,) = evaluate(recipe, ["reading"])
    assert card.training is not None and found.scores["accuracy"].value == pytest.approx(
        card.training.scores["accuracy"], abs=1e-6
    )
    texts = ["a red ring", "a red ring to the left of a blue star"]
    said = [each.answers[0].label for each in say(texts, "reading", str(place / "registry"))]
    assert set(said) <= {"one", "two"} and len(said) == 2
