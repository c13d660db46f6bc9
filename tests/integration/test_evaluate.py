"""`gtl evaluate` on a real Ray cluster: samples are drawn once, scored, kept beside the adapter, and compared."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gtl.adapters import Card, Registry
from gtl.adapters.card import base_of
from gtl.adapters.delta import write_delta
from gtl.adapters.formats import LoraExport, write_lora
from gtl.backbones import open_backbone
from gtl.backbones.base import TextBackbone
from gtl.cli import main
from gtl.config import Recipe, parse_recipe
from gtl.data.prepare import prepare
from gtl.evaluate import extract
from gtl.evaluate.extract import Drawn, examine
from gtl.evaluate.held_out import HeldOut, Look, Validator, needs_of
from gtl.evaluate.result import Evaluation, compare
from gtl.evaluate.run import evaluate
from gtl.evaluate.scores import clip_score, cmmd
from gtl.families import open_family
from gtl.generate.spread import Model, Origin, Published
from gtl.images import decode
from gtl.search.fusion import search_weights
from gtl.storage import Store
from gtl.types import UserError
from tests.loras import publish_dog, random_lora
from tests.tiny import make_clip, write_pictures

METRICS = ["kid", "diversity", "precision", "recall", "memorization"]
SAMPLES = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a registry with a LoRA of it, and twelve pictures."""
    folder = publish_dog(tmp_path_factory.mktemp("evaluate"))
    write_pictures(folder / "images", [(64, 64)] * 9 + [(96, 64)] * 3)
    return folder


def make_recipe(place: Path, **asked: Any) -> Recipe:
    return parse_recipe({
        "model": {"source": str(place / "model")},
        "data": {"source": str(place / "images"), "resolution": 64, "validation": 0.25},
        "evaluate": {"metrics": METRICS, "samples": SAMPLES, "steps": 2, "seed": 3, **asked},
        "storage": {name: str(place / name) for name in ("runs", "cache", "registry")},
    })


class Told:
    """The phases that progress was told of, each with its last numbers."""

    def __init__(self) -> None:
        self.phases: dict[str, tuple[int, int]] = {}

    def __call__(self, phase: str, done: int, total: int, detail: str = "") -> None:
        self.phases[phase] = done, total


def test_an_adapter_beside_the_model_alone(ray_cluster: None, place: Path) -> None:
    told = Told()
    alone, dog = evaluate(make_recipe(place), [None, "dog"], progress=told)
    assert told.phases["draw"] == (2 * SAMPLES, 2 * SAMPLES)
    assert (alone.adapter, dog.adapter) == (None, "dog@v1")
    assert alone.sampling == dog.sampling
    assert (dog.images, dog.held_out, len(dog.sampling.prompts)) == (12, 3, SAMPLES)
    for evaluation in (alone, dog):
        assert list(evaluation.scores) == METRICS
        counted = {name: (score.num_fake, score.num_real) for name, score in evaluation.scores.items()}
        assert counted == {
            "kid": (8, 12), "diversity": (8, None), "precision": (8, 12), "recall": (8, 12), "memorization": (8, 3)
        }  # fmt: skip
        assert {score.extractor for score in evaluation.scores.values()} == {"builtin:backbone"}
        assert evaluation.scores["memorization"].note == (
            "samples are farther from training images than held-out images are"
        )
        assert sorted(match.sample for match in evaluation.nearest) == list(range(SAMPLES))
    kept = place / "registry" / "dog" / "v1" / "evaluations"
    assert {file.name for file in kept.iterdir()} == {f"{dog.key}.json", f"{dog.key}.png"}
    assert Evaluation.model_validate_json((kept / f"{dog.key}.json").read_bytes()) == dog
    assert decode(kept / f"{dog.key}.png").size == (8 * 64, 2 * (64 + 16))
    found = {difference.metric: difference.value for difference in compare(alone, dog)}
    assert found == pytest.approx({
        name: dog.scores[name].value - alone.scores[name].value for name in METRICS
    })  # fmt: skip
    assert found["diversity"] != 0


def test_weights_of_a_fusion_are_searched_by_drawing_with_all_at_once(ray_cluster: None, place: Path) -> None:
    family, shelf = open_family(str(place / "model")), Registry(place / "registry")
    folder = place / "wolf"
    folder.mkdir()
    weights = random_lora(family.load("unet"), "unet", rank=2, seed=9)
    write_lora(weights, folder, config=LoraExport(rank=2, alpha=2))
    base = base_of(family, str(place / "model"))
    shelf.publish("wolf", "v1", folder, Card(name="wolf", version="v1", base=base, tuner={"type": "lora"}))
    recipe = make_recipe(place, metrics=["diversity"])
    own = place / "registry" / "dog" / "v1" / "evaluations"
    before = {file.name for file in own.glob("*.json")}
    found = search_weights(recipe, ["dog", "wolf"], tries=4)
    scores = {weights: evaluation.scores["diversity"].value for weights, evaluation in found.tried}
    assert scores.keys() == {(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5)}
    assert list(scores.values()) == sorted(scores.values(), reverse=True) and len(set(scores.values())) == 4
    both, half = evaluate(recipe, [["dog", "wolf@v1"], ["dog:0.5", "wolf:0.5"]])
    assert (both.adapter, half.adapter) == ("dog@v1 + wolf@v1", "dog@v1:0.5 + wolf@v1:0.5")
    assert both.scores["diversity"].value == pytest.approx(scores[1.0, 1.0])
    assert half.scores["diversity"].value == pytest.approx(scores[0.5, 0.5])
    new = {file.name for file in own.glob("*.json")} - before
    assert len(new) <= 2, "what it scores alone, by each of two seeds, and nothing of the two together"
    assert {json.loads((own / name).read_text())["adapter"] for name in new} <= {"dog@v1"}


def test_samples_are_drawn_once_and_more_go_beside_them(
    ray_cluster: None, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (before,) = evaluate(make_recipe(place), ["dog@v1"])
    told = Told()
    (again,) = evaluate(make_recipe(place, metrics=["kid"]), ["dog@v1"], progress=told)
    assert told.phases["draw"] == (SAMPLES, SAMPLES)
    assert again.scores["kid"] == before.scores["kid"]
    file = place / "recipe.yaml"
    file.write_text(json.dumps(make_recipe(place, metrics=["diversity"]).model_dump(mode="json")))
    monkeypatch.setattr(sys, "argv", ["gtl", "evaluate", str(file), "--adapter", "dog", "--base",
                                      "--json", str(place / "new" / "scores.json")])  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "the model alone" and lines[4] == "dog@v1" and lines[8] == "dog@v1 less the model alone"
    assert lines[1].split() == ["metric", "value", "95", "%", "interval", "better", "drawn", "real", "extractor"]
    alone, dog = json.loads((place / "new" / "scores.json").read_text())
    assert dog["scores"]["diversity"]["value"] == pytest.approx(before.scores["diversity"].value)


def test_clip_compares_samples_with_their_prompts_and_with_real_images(ray_cluster: None, place: Path) -> None:
    recipe = make_recipe(place, metrics=["clip_score", "cmmd"], clip=str(make_clip(place / "clip")))
    (found,) = evaluate(recipe)
    clip, drawn = open_backbone(str(place / "clip")), Store(found.samples or "")
    assert isinstance(clip, TextBackbone)
    pictures = clip([decode(drawn.read(f"{i:06d}.png")) for i in range(SAMPLES)])[0]
    real = clip([decode(file).crop((16, 0, 80, 64) if decode(file).width == 96 else (0, 0, 64, 64))
                 for file in sorted((place / "images").glob("*.png"))])[0]  # fmt: skip
    texts = clip.encode_texts(found.sampling.prompts)
    expected = {"clip_score": clip_score(pictures, texts), "cmmd": cmmd(real, pictures)}
    assert expected["clip_score"].value > 1
    assert list(found.scores) == list(expected)
    for name, score in found.scores.items():
        assert (score.value, score.low) == pytest.approx((expected[name].value, expected[name].low), rel=1e-4), name
        assert (score.num_fake, score.num_real) == (SAMPLES, expected[name].num_real)
        assert (score.extractor, score.resize) == (clip.name, clip.resize)


def examiners() -> list[int]:
    """Process ids of the cluster's actors that have a backbone."""
    from ray._private.state import actors

    known = actors().values()
    return [actor["Pid"] for actor in known if actor["ActorClassName"] == "Examiner" and actor["State"] == "ALIVE"]


def test_several_actors_share_the_pictures_and_one_that_is_lost_costs_its_piece(
    ray_cluster: None, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "CHUNK", 2)
    monkeypatch.setattr(extract, "CHUNKS_OF_A_CPU", 3)
    monkeypatch.setattr(extract, "MEMORY", 1)
    pictures = [Drawn(str(place / "images"), f"{i}.png") for i in range(12)]
    told: list[tuple[int, int, str]] = []
    killed: list[int] = []

    def watch(phase: str, done: int, total: int, detail: str = "") -> None:
        told.append((done, total, detail))
        if done == 2 and not killed:  # a piece is done, and who did it has another
            killed.extend(examiners())
            for number in killed:
                os.kill(number, signal.SIGKILL)

    sets = {"all": [*pictures, pictures[0]], "some": pictures[5:8]}
    found, facts = examine("builtin:backbone", Store(tmp_path), sets, watch)
    assert killed and {detail[-12:] for _, _, detail in told} == {"of 2 workers"}
    assert told[-1][:2] == (12, 12), "those that are there twice are looked at once"
    backbone = open_backbone("builtin:backbone")
    expected = backbone([decode(place / "images" / picture.key) for picture in pictures])
    for mine, theirs in zip(found["all"], expected, strict=True):
        assert mine is not None and theirs is not None
        assert torch.allclose(mine, torch.cat((theirs, theirs[:1])), rtol=1e-4, atol=1e-4)
    assert torch.equal(found["some"].features, found["all"].features[5:8])
    assert (facts.extractor, facts.resize) == (backbone.name, backbone.resize)
    assert examiners() == []


@pytest.mark.parametrize(
    ("asked", "adapter", "message"),
    [
        ({"prompts": []}, None, "evaluate.prompts: []: there is nothing to draw"),
        ({"metrics": ["clip_score"]}, None, "evaluate.clip: null: clip_score needs a CLIP model"),
        ({"metrics": ["fid"]}, None, "evaluate.samples: 8: fid needs at least 100"),
        ({"metrics": ["fid"], "samples": 100}, None, "evaluate.metrics: fid: needs 100 images (real), there are 12"),
        ({"backbone": "/nowhere"}, None, "/nowhere"),
        ({}, "cat", "adapter 'cat': not in the registry"),
    ],
)
def test_a_mistake_is_one_line(
    ray_cluster: None, place: Path, asked: dict[str, Any], adapter: str | None, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        evaluate(make_recipe(place, **asked), [adapter])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_loss_needs_images_that_are_held_out(place: Path) -> None:
    values = make_recipe(place, metrics=["kid", "val_loss"]).model_dump(mode="json")
    values["data"]["validation"] = 0
    with pytest.raises(UserError, match=r"^evaluate\.metrics: val_loss: needs images that are held out; set data\.va"):
        evaluate(parse_recipe(values))


def publish(place: Path, name: str, write: Callable[[Path], None], kind: str = "lora") -> Model:
    """An adapter of the model, as the cluster knows it."""
    write(place / name)
    source = str(place / "model")
    base = base_of(open_family(source), source)
    registry = Registry(place / "registry")
    registry.publish(name, "v1", place / name, Card(name=name, version="v1", base=base, tuner={"type": kind}))
    return Model(Origin(source), base.fingerprint, (Published(str(place / "registry"), f"{name}@v1"),))


def test_a_loss_is_of_the_text_encoders_that_an_adapter_moves(ray_cluster: None, place: Path) -> None:
    recipe, family = make_recipe(place, metrics=["val_loss"], prompts=[]), open_family(str(place / "model"))
    alone, dog = (found.scores["val_loss"] for found in evaluate(recipe, [None, "dog"]))
    assert abs(dog.value - alone.value) > 1e-3 * alone.value
    encoder, config = family.load("text_encoder"), LoraExport(rank=4, alpha=4)
    tensors = random_lora(encoder, "text_encoder")
    words = publish(place, "words", lambda folder: write_lora(tensors, folder, config=config))
    needs = needs_of(recipe, [words], family)
    assert (recipe.needs.text, needs.text) == ("embeddings", "tokens")
    dataset = prepare(recipe.data, family, recipe.storage.cache, dtype="fp32", needs=needs, held_out=True)
    assert len(dataset.entries) == len(dataset.images) == 3, "no image that is trained on is encoded for it"
    validator = Validator("cpu", HeldOut(recipe.storage.cache, dataset.fingerprint, recipe.objective, needs, 0))
    models = (replace(words, adapters=()), words)
    live, moved = (
        [seen.losses for seen in validator.work([Look(model, image) for image in range(3)])] for model in models
    )
    assert np.mean(live) == pytest.approx(alone.value, rel=1e-5), "as with captions that were encoded before"
    assert abs(np.mean(moved) - alone.value) > 1e-3 * alone.value


def test_a_loss_that_does_not_depend_on_what_an_adapter_moves_is_refused(place: Path) -> None:
    recipe, family = make_recipe(place, metrics=["val_loss"]), open_family(str(place / "model"))
    moved = {"vae.post_quant_conv.bias": torch.zeros(4)}
    codec = publish(place, "codec", lambda folder: write_delta(moved, folder), "full")
    with pytest.raises(UserError, match=r"^evaluate\.metrics: val_loss: codec@v1 moves vae, which objective\.type den"):
        needs_of(recipe, [codec], family)


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(UserError, match=r"evaluate\.metrics.*fdi"):
        parse_recipe({"model": {"source": "a/b"}, "data": {"source": "c"}, "evaluate": {"metrics": ["fdi"]}})


def test_prompts_of_scenes_are_read_off_their_pictures(ray_cluster: None, place: Path) -> None:
    values = make_recipe(place, metrics=["prompt_accuracy"], samples=2, steps=10, guidance=3.0).model_dump(mode="json")
    values["model"]["source"] = "builtin:tiny"
    values["evaluate"]["prompts"] = ["a large red circle on a white background"]
    (found,) = evaluate(parse_recipe(values))
    score = found.scores["prompt_accuracy"]
    assert (score.value, score.low, score.num_fake, score.extractor) == (1.0, None, 2, "builtin:reader")
    values["evaluate"]["prompts"] = ["a portrait"]
    with pytest.raises(UserError, match=r"^evaluate\.metrics: prompt_accuracy: 'a portrait': no caption of"):
        evaluate(parse_recipe(values))
