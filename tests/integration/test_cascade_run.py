"""DeepFloyd IF from `gtl train` to a picture: both stages on two workers by its recipes, and drawn with together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from gtl.adapters import Registry
from gtl.config import Recipe, load_recipe
from gtl.evaluate.run import evaluate
from gtl.generate.command import Enlarged, run
from gtl.images import decode, read_recipe
from gtl.train.launch import train
from tests.tiny import make_deepfloyd, make_deepfloyd_upscaler

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.soak]
RECIPES = Path(__file__).parents[2] / "gtl" / "recipes"
STEPS = 14
"""One pass over what is trained on."""
PROMPT = "a large red moon on a white background"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cascade")
    make_deepfloyd(folder / "small", unet_config={"sample_size": 16})
    make_deepfloyd_upscaler(folder / "large")
    return folder


def recipe_of(place: Path, recipe: str, stage: str, *changes: str) -> Recipe:
    """A recipe of ours for a tiny model and built-in pictures, at a rate at which so few steps show."""
    stores = [f"storage.{name}={json.dumps(str(place / name))}" for name in ("runs", "cache", "registry")]
    return load_recipe(RECIPES / f"{recipe}.yaml", [
        *stores, f"model.source={json.dumps(str(place / stage))}", "data.source=builtin:scenes?count=240",
        f"data.resolution={16 if stage == 'small' else 64}", "data.buckets=false", "data.validation=0.1",
        "train.batch_size=16", "train.learning_rate=2e-3", "train.schedule.warmup=2", "train.workers=2",
        "train.gpus_per_worker=0", "train.ema=null", "evaluate.every=7", "evaluate.steps=4", *changes,
    ])  # fmt: skip


def rows_of(place: Path, name: str) -> list[dict[str, Any]]:
    (file,) = (place / "runs" / name).glob("*/metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def moved(place: Path, name: str) -> set[str]:
    """Names of the published weights."""
    with safe_open(Registry(place / "registry").fetch(name) / "delta.safetensors", framework="pt") as file:
        return set(file.keys())


IMAGEN, CASCADE = "imagen_deepfloyd_freeze", "cascade_deepfloyd_lora"


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """Stage 1 by partial freezing on ZeRO 2 and on ZeRO 0, stage 2 by partial freezing and by LoRA on ZeRO 2."""
    once = ("train.epochs=1", "evaluate.samples=128")
    for name, stage in (("first", 2), ("whole", 0)):
        train(recipe_of(place, IMAGEN, "small", f"train.zero.stage={stage}", *once), name)
    train(recipe_of(place, IMAGEN, "large", "train.zero.stage=2", "evaluate.metrics=[val_loss]", *once), "second")
    train(recipe_of(place, CASCADE, "large", "train.zero.stage=2", f"train.steps={STEPS}"), "second-lora")
    return place


@pytest.mark.parametrize(("name", "share"), [("first", 0.98), ("second", 0.98), ("second-lora", 1.0)])
def test_a_stage_learns_on_two_workers(trained: Path, name: str, share: float) -> None:
    """Its loss falls at every look, and to this share; a LoRA of attentions moves little of what has random weights."""
    rows = rows_of(trained, name)
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 7, STEPS]
    looks = [row["val_loss"] for row in rows if "val_loss" in row]
    assert looks[0] > looks[1] > looks[2] and looks[2] < share * looks[0]
    # The variance is learned beside the noise.
    assert all(row["loss"] > row["mse"] > 0 for row in rows if "loss" in row)
    (grids,) = (trained / "runs" / name).glob("*/samples")
    assert [path.name for path in sorted(grids.iterdir())] == ["00000000.png", "00000007.png", "00000014.png"]


def test_shards_of_the_optimizer_change_nothing(trained: Path) -> None:
    sharded, whole = ([row["loss"] for row in rows_of(trained, name) if "loss" in row] for name in ("first", "whole"))
    assert len(sharded) == STEPS and sharded == pytest.approx(whole, rel=1e-4)


def test_what_was_frozen_is_not_published(trained: Path) -> None:
    for name in ("first", "second"):
        names = moved(trained, name)
        assert names and {each.split(".")[0] for each in names} == {"unet"}, "T5 reads as before"
        assert not [each for each in names if each.startswith(("unet.conv_in", "unet.down_blocks"))]
        assert [each for each in names if each.startswith("unet.up_blocks")]


def test_the_first_stage_is_measured_as_its_recipe_says(trained: Path) -> None:
    recipe = recipe_of(trained, IMAGEN, "small", "evaluate.samples=128", "evaluate.guidance=3.0")
    base, found = evaluate(recipe, [None, "first"])
    assert found.scores.keys() == base.scores.keys() == {"fid", "kid", "inception_score", "val_loss"}
    assert found.scores["val_loss"].value == pytest.approx(rows_of(trained, "first")[-1]["val_loss"], rel=1e-4)
    assert found.scores["val_loss"].value < base.scores["val_loss"].value
    assert found.scores["fid"].num_fake == 128 and found.scores["fid"].num_real == 240


@pytest.mark.parametrize("second", ["second", "second-lora"])
def test_both_draw_together(trained: Path, tmp_path: Path, second: str) -> None:
    def draw(adapters: list[str], larger: list[str]) -> bytes:
        (path,) = run(
            out=tmp_path / "-".join(["x", *adapters, *larger]), model=str(trained / "small"), adapters=adapters,
            upscaler=Enlarged(str(trained / "large"), larger), prompt=PROMPT, seed=3, steps=4, guidance=3.0,
            registry=str(trained / "registry"),
        )  # fmt: skip
        said = read_recipe(path)
        assert [each.partition("@")[0] for each in said["upscaler"]["adapters"]] == larger
        image = decode(path)
        assert image.size == (64, 64)
        return image.tobytes()

    pictures = [draw([], []), draw(["first"], []), draw(["first"], [second])]
    assert len(set(pictures)) == 3, "each stage's adapter shows"
