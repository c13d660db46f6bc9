"""Heads from `gtl train` to `gtl evaluate`: two workers, a network that learns too, one that is frozen, and a text
encoder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gtl.adapters import Registry
from gtl.config import Recipe, parse_recipe
from gtl.data.dataset import NO_SPACE, Dataset
from gtl.data.prepare import prepare
from gtl.evaluate.run import evaluate
from gtl.families import open_family
from gtl.families.classifier_blank import write_text_classifier
from gtl.features.heads import make_heads
from gtl.features.say import say
from gtl.storage import Store
from gtl.types import Task, UserError
from tests.tiny import make_sd, make_vision, write_pictures

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


@pytest.fixture(scope="module")
def reader(place: Path) -> Path:
    """A text encoder with a head for two kinds of animals."""
    make_sd(place / "sd")
    tasks = {"animal": Task("kind", "class", ("cat", "dog"))}
    write_text_classifier(str(place / "sd"), "text_encoder", tasks, place / "reader")
    return place / "reader"


@pytest.mark.usefixtures("reader")
def test_heads_that_read_are_trained_measured_and_used(place: Path) -> None:
    """On captions of the same pictures, by two workers; of a text encoder with random weights, which tells words."""
    from gtl.train.launch import train

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


TEXTS = ["a photo of a cat", "a dog", "cat on the left", "two dogs and a dog", "the cat", "a small dog in the snow"]


def folder_of(place: Path, texts: list[str | None]) -> Path:
    """As many pictures as texts; their kind is in labels.jsonl, and the texts that there are beside them."""
    write_pictures(place, [(32 + i, 24) for i in range(len(texts))])
    (place / "metadata.jsonl").unlink()
    names = sorted(path.name for path in place.glob("*.png"))
    rows = [json.dumps({"file_name": name, "kind": ("cat", "dog")[i % 2]}) for i, name in enumerate(names)]
    (place / "labels.jsonl").write_text("\n".join(rows))
    for name, text in zip(names, texts, strict=True):
        if text is not None:
            (place / name).with_suffix(".txt").write_text(text)
    return place


def recipe_of(folder: Path, source: Path, **data: Any) -> Recipe:
    return parse_recipe({
        "model": {"source": str(folder)}, "tuner": {"type": "head"}, "objective": {"type": "classify"},
        "data": {"source": str(source), "resolution": 64, **data},
    })  # fmt: skip


def test_captions_are_encoded_once_and_pictures_stay_closed(reader: Path, tmp_path: Path) -> None:
    recipe, family = recipe_of(reader, folder_of(tmp_path / "data", [*TEXTS])), open_family(str(reader))
    cache, told = tmp_path / "cache", list[tuple[Any, ...]]()
    for _ in range(2):
        dataset = prepare(
            recipe.data, family, str(cache), dtype="fp32", needs=recipe.needs, progress=lambda *row: told.append(row)
        )
    whole = len(TEXTS) + 1  # and the empty one, the first time only
    assert [row[1:3] for row in told if row[0] == "encode"][-1] == (whole, whole)
    assert sum(row[0] == "encode" and row[1] == whole for row in told) == 1
    assert dataset.images.name == NO_SPACE and dataset.prompts is not None
    assert [path.name for path in (cache / "tensors").iterdir()] == [dataset.prompts.name]
    loaded = Dataset.load(Store(str(cache)), dataset.fingerprint)
    items = [loaded.item(i, 0, 0) for i in range(len(TEXTS))]
    assert {item.caption for item in items} == set(TEXTS)
    encoders = {"backbone": family.load("backbone", torch.float32)}
    for item in items:
        assert item.latents == {} and item.pixels is None
        with torch.no_grad():
            (expected,) = family.encode_prompts(encoders, [item.caption])  # type: ignore[attr-defined]
        torch.testing.assert_close(item.conditions["pooled"], expected["pooled"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("texts", "data", "said"), [
    ([None] * 4, {}, "^data.captions: all 4 images have the caption 'data', of which the model's heads can tell"),
    (["a cat", "a dog", None, None], {"captions": "sidecar"}, "^data.captions: sidecar: 2 images have no such caption"),
])  # fmt: skip
def test_data_without_captions_is_one_line(
    reader: Path, tmp_path: Path, texts: list[str | None], data: dict[str, Any], said: str
) -> None:
    recipe = recipe_of(reader, folder_of(tmp_path / "data", texts), **data)
    with pytest.raises(UserError, match=said):
        prepare(recipe.data, open_family(str(reader)), str(tmp_path / "cache"), dtype="fp32", needs=recipe.needs)
