"""Heads on text encoders: features of captions, a head that learns from them, and what is refused; with data and
workers see tests/integration/test_heads_run.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gtl.adapters import apply
from gtl.adapters.base import empty_parts, model_parts
from gtl.config import Recipe, parse_recipe
from gtl.families import denoising, open_family, seeing
from gtl.families.classifier_blank import write_classifier, write_text_classifier
from gtl.families.text_classifier import pooled
from gtl.objectives import make_objective
from gtl.train.assemble import join, live_parts, outline
from gtl.train.footprint import measure
from gtl.tuners import make_tuner
from gtl.types import Batch, Geometry, Item, Task, UserError
from tests.overfit import overfit
from tests.tiny import make_deepfloyd_upscaler, make_flux, make_gan, make_sd, make_sdxl

TASKS = {"animal": Task("kind", "class", ("cat", "dog"))}
TEXTS = ["a photo of a cat", "a dog", "cat on the left", "two dogs and a dog", "the cat", "a small dog in the snow"]
KINDS = {
    "clip": (make_sd, "text_encoder", "CLIPTextModel"),
    "clip-2": (make_sdxl, "text_encoder_2", "CLIPTextModelWithProjection"),
    "t5": (make_flux, "text_encoder_2", "T5EncoderModel"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind, (make, part, _) in KINDS.items():
        found[kind] = tmp_path_factory.mktemp(kind) / "model"
        write_text_classifier(str(make(found[kind].parent / "base")), part, TASKS, found[kind])
    return found


def recipe_of(folder: Path, tuner: str = "head") -> Recipe:
    return parse_recipe({
        "model": {"source": str(folder)}, "tuner": {"type": tuner}, "objective": {"type": "classify"},
        "data": {"source": "nowhere", "resolution": 64},
    })  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_of_a_texts_own_tokens(models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """They are those of the base's encoder, whatever stands beside them in a batch, and of no image."""
    family: Any = open_family(str(models[kind]))
    assert (family.name, family.main, family.encoders, family.codec) == (
        "text_classifier", "backbone", ("backbone",), None,
    )  # fmt: skip
    assert family.tasks == TASKS and family.learns == ("classify",) and family.classes["backbone"][1] == KINDS[kind][2]
    assert model_parts(family) == ["backbone", "head"] and list(empty_parts(family)) == ["backbone", "head"]
    encoders = {"backbone": family.load("backbone", torch.float32)}
    with torch.no_grad():
        found = [row["pooled"] for row in family.encode_prompts(encoders, TEXTS)]
        alone = family.encode_prompts(encoders, [TEXTS[1]])[0]["pooled"]
        base: Any = open_family(str(models[kind].parent / "base"))
        part = KINDS[kind][1]
        theirs = pooled(base.load(part, torch.float32), base.tokenizers[part], TEXTS)
        ids = torch.tensor([family.tokenizers["backbone"](TEXTS[1])["input_ids"]])
        states = encoders["backbone"](input_ids=ids).last_hidden_state[0]
        said = family.load("head")({"pooled": torch.stack(found)})
    assert tuple(found[0].shape) == family.feature_shapes(0, 0)["pooled"] == (2 * states.shape[1],)
    torch.testing.assert_close(alone, torch.cat([states.mean(0), states.amax(0)]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(found), theirs)
    assert said["animal"].shape == (len(TEXTS), 2)
    with pytest.raises(UserError, match="its heads read captions, and look at no pictures"):
        family.encode_images(None, torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match="draws nothing; this is for models that draw by denoising"):
        denoising(family)
    head = family.load("head")
    with torch.no_grad():
        next(head.parameters()).add_(1)
    family.export({"head": head}, tmp_path / "out")
    again = open_family(str(tmp_path / "out"))
    assert again.fingerprint("backbone") == family.fingerprint("backbone")
    assert again.fingerprint() != family.fingerprint()


def test_a_head_learns_and_publishes_what_it_learned(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of(models["clip"])
    family = seeing(open_family(recipe.model.source))
    trainee = join(recipe, "fp32", family, make_tuner(recipe.tuner, family), "cpu")
    assert live_parts(recipe, family, trainee.objective) == ["head"]
    with torch.no_grad():
        features = family.encode_prompts({"backbone": family.load("backbone", torch.float32)}, TEXTS)
    draws = []
    for text, conditions in zip(TEXTS, features, strict=True):
        labels = json.dumps({"kind": "cat" if "cat" in text else "dog"})
        item = Item({}, conditions, {}, Geometry((64, 64), (0, 0), (64, 64)), text, labels=labels)
        draws.append(trainee.objective.draw(item, torch.Generator()))
    batch = Batch(trainee.objective.collate(draws), torch.full((len(TEXTS),), 1 / len(TEXTS)))
    (player,) = trainee.players.values()
    losses = overfit(player, trainee.parameters.values(), batch, 40, 5e-2)
    assert losses[-1] < 0.1 * losses[0]
    with torch.no_grad():
        assert player.eval()(batch).outcomes["right.animal"].all()
    tensors = {name: value.detach().clone() for name, value in (trainee.parameters | trainee.buffers).items()}
    trainee.tuner.export(tensors, tmp_path / "adapter")
    fresh = {name: family.load(name, torch.float32) for name in trainee.parts}
    apply(fresh, tmp_path / "adapter")
    (again,) = make_objective(recipe.objective, family).players(fresh, torch.float32).values()
    with torch.no_grad():
        mine, theirs = (each.eval().outputs(batch.tensors)["animal"] for each in (again, player))
    torch.testing.assert_close(mine, theirs)
    found = measure(recipe, outline(recipe, "fp32", family))
    assert found.trained == sum(value.numel() for value in trainee.parameters.values())


@pytest.mark.parametrize(("make", "part", "tasks", "said"), [
    (make_gan, "text_encoder", TASKS, "a model of family gan draws at once; this is for models that draw by denoising"),
    (make_sd, "text_encoder_2", TASKS, "--part text_encoder_2: .*: no text encoder of that name; the model has "
                                       "text_encoder$"),
    (lambda place: make_deepfloyd_upscaler(place, reader=False), "text_encoder", TASKS, "has no text_encoder"),
    (make_sd, "text_encoder", {"things": Task("boxes", "boxes", ("cat",))}, "--task things: boxes are places in pict"),
])  # fmt: skip
def test_a_model_without_such_an_encoder_is_one_line(
    tmp_path: Path, make: Any, part: str, tasks: dict[str, Task], said: str
) -> None:
    make(tmp_path / "base")
    with pytest.raises(UserError, match=said):
        write_text_classifier(str(tmp_path / "base"), part, tasks, tmp_path / "model")


def test_only_heads_move(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of(models["clip"], tuner="full")
    with pytest.raises(UserError, match="tuner.type: what .* makes of captions is frozen; take head"):
        outline(recipe, "fp32", open_family(recipe.model.source))
    write_classifier("builtin:pixels", TASKS, tmp_path / "pixels")
    with pytest.raises(UserError, match="its heads look at pictures, and read no captions"):
        seeing(open_family(str(tmp_path / "pixels"))).encode_prompts({}, ["a cat"])
