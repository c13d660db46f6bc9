"""Models that see: the verbs of their family, and all of their pairs, which learn and publish what they learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtl.adapters import apply
from gtl.adapters.base import empty_parts, model_parts
from gtl.adapters.merge import merge
from gtl.config import Recipe, parse_recipe
from gtl.config.pairs import PAIRS
from gtl.families import denoising, open_family, seeing
from gtl.families.base import Family
from gtl.families.classifier_blank import write_classifier, write_diffusion_classifier
from gtl.objectives import make_objective
from gtl.train.assemble import Trainee, iterated, join, live_parts, outline
from gtl.train.footprint import measure
from gtl.tuners import make_tuner
from gtl.types import Batch, Geometry, Item, Task, UserError
from tests.overfit import overfit
from tests.tiny import make_sd, make_vision

TASKS = {
    "side": Task("side", "class", ("left", "right")),
    "things": Task("objects", "boxes", ("bar", "dot")),
}
TUNERS: dict[str, dict[str, Any]] = {"head": {}, "full": {}, "freeze": {"freeze_depth": 1}}
KINDS = ("scenes", "resnet", "vit", "dinov2")
SIDE = 64
BLOCKS = {"scenes": 3, "resnet": 3, "vit": 2, "dinov2": 2}


def write(kind: str, folder: Path, tasks: dict[str, Task] = TASKS) -> Path:
    if kind == "diffusion":
        write_diffusion_classifier(str(make_sd(folder / "sd")), tasks, folder / "model", time=0.1, block=0.5)
    else:
        source = {"scenes": "builtin:backbone", "pixels": "builtin:pixels"}.get(kind)
        write_classifier(source or str(make_vision(folder / kind, kind)), tasks, folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write(kind, tmp_path_factory.mktemp(kind)) for kind in (*KINDS, "pixels", "diffusion")}


def recipe_of(folder: Path, tuner: str = "full", **sections: Any) -> Recipe:
    return parse_recipe({
        "model": {"source": str(folder), **sections.pop("model", {})}, "tuner": {"type": tuner, **TUNERS[tuner]},
        "objective": {"type": "classify", **sections.pop("objective", {})},
        "data": {"source": "nowhere", "resolution": SIDE}, **sections,
    })  # fmt: skip


def trainee_of(recipe: Recipe) -> Trainee:
    family = open_family(recipe.model.source)
    return join(recipe, "fp32", family, make_tuner(recipe.tuner, family), "cpu")


def picture(number: int) -> tuple[Tensor, dict[str, Any]]:
    """Grey, with a bright square on its left or on its right."""
    rng = torch.Generator().manual_seed(number)
    pixels = torch.randint(90, 120, (3, SIDE, SIDE), dtype=torch.uint8, generator=rng)
    left, top = 8 + 28 * (number % 2), 8 + int(torch.randint(24, (), generator=rng))
    pixels[:, top : top + 20, left : left + 20] += 130
    side = ("left", "right")[number % 2]
    return pixels, {"side": side, "objects": {"bbox": [[left, top, 20, 20]], "categories": ["dot"]}}


def batch_of(trainee: Trainee, samples: int = 8) -> Batch:
    geometry, draws, family = Geometry((SIDE, SIDE), (0, 0), (SIDE, SIDE)), [], seeing(trainee.family)
    backbone = family.load("backbone", torch.float32) if "backbone" not in trainee.parts else None
    for number in range(samples):
        pixels, labels = picture(number)
        latents: dict[str, Tensor] = {}
        if backbone is not None:
            with torch.no_grad():
                found = family.encode_images(backbone, pixels[None].float() / 127.5 - 1)
            latents = {name: value[0] for name, value in found.items()}
        item = Item(latents, {}, {}, geometry, pixels=None if latents else pixels, labels=json.dumps(labels))
        draws.append(trainee.objective.draw(item, torch.Generator()))
    return Batch(trainee.objective.collate(draws), torch.full((samples,), 1 / samples))


def test_the_walk_is_of_all_pairs() -> None:
    assert {tuner for tuner, objective in PAIRS if objective == "classify"} == TUNERS.keys()


@pytest.mark.parametrize("kind", [*KINDS, "pixels", "diffusion"])
def test_the_family_is_what_its_folder_says(models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    family: Any = open_family(str(models[kind]))
    assert (family.main, family.heads, family.encoders, family.critics) == ("backbone", ("head",), (), ())
    assert family.tasks == TASKS and family.learns == ("classify",)
    assert model_parts(family) == ["backbone", "head"] and list(empty_parts(family)) == ["backbone", "head"]
    backbone, head = family.load("backbone", torch.float32), family.load("head")
    pixels = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        found = family.encode_images(backbone, pixels)
        assert {name: tuple(value.shape[1:]) for name, value in found.items()} == family.feature_shapes(SIDE, SIDE)
        alone = family.encode_images(backbone, pixels[1:2])
        assert all(torch.allclose(value[0], found[name][1], atol=1e-4) for name, value in alone.items())
        said = head(found)
    assert said["side"].shape == (3, 2) and said["things"].shape[:2] == (3, 6)
    assert len(family.blocks(backbone)) == BLOCKS.get(kind, 0)
    if kind in KINDS:
        inside = (*family.embedders(backbone), *(name for block in family.blocks(backbone) for name in block))
        names = {name for name, _ in backbone.named_parameters() if not name.startswith(inside)}
        assert {name.split(".")[0] for name in names} <= {"network", "layernorm", "pooler"}
    for part in ("backbone", "head"):
        stored, built = {name for name, _ in family.weights(part)}, family.load(part, torch.float32)
        assert stored >= {name for name, _ in built.named_parameters()}
    with torch.no_grad():
        next(head.parameters()).add_(1)
    family.export({"head": head}, tmp_path / "out")
    again: Any = open_family(str(tmp_path / "out"))
    assert torch.equal(next(again.load("head").parameters()), next(head.parameters()))
    assert again.fingerprint("backbone") == family.fingerprint("backbone")
    assert again.fingerprint() != family.fingerprint()
    with pytest.raises(UserError, match="draws nothing; this is for models that draw by denoising"):
        denoising(family)


QUICK = [("head", "scenes"), ("head", "diffusion"), ("full", "resnet"), ("freeze", "vit")]
CASES = [
    pytest.param(tuner, kind, marks=() if (tuner, kind) in QUICK else pytest.mark.soak)
    for tuner in TUNERS for kind in (*KINDS, *(("pixels", "diffusion") if tuner == "head" else ()))
]  # fmt: skip


@pytest.mark.parametrize(("tuner", "kind"), CASES)
def test_a_pair_learns_and_publishes_what_it_learned(
    models: dict[str, Path], tmp_path: Path, tuner: str, kind: str
) -> None:
    recipe = recipe_of(models[kind], tuner)
    trainee = trainee_of(recipe)
    family = trainee.family
    assert live_parts(recipe, family, trainee.objective) == ["head", *(["backbone"] if tuner != "head" else [])]
    (player,), batch = trainee.players.values(), batch_of(trainee)
    losses = overfit(player, trainee.parameters.values(), batch, 40, 5e-3)
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        outcomes = player.eval()(batch).outcomes
    # Heads alone on networks with random weights need not tell all of them.
    assert outcomes["right.side"].float().mean() >= (0.75 if tuner == "head" else 1)
    assert outcomes["there.things"].tolist() == [[0, 1]] * 8

    tensors = {name: value.detach().clone() for name, value in (trainee.parameters | trainee.buffers).items()}
    trainee.tuner.export(tensors, tmp_path / "adapter")
    for put in (apply, lambda parts, where: merge(parts, ((where, 1.0),))):
        fresh = {name: family.load(name, torch.float32) for name in trainee.parts}
        put(fresh, tmp_path / "adapter")
        parts = {name: part.eval() for name, part in fresh.items()}
        (again,) = make_objective(recipe.objective, family).players(parts, torch.float32).values()
        with torch.no_grad():
            for name, value in again.eval().outputs(batch.tensors).items():
                torch.testing.assert_close(value, player.outputs(batch.tensors)[name], rtol=1e-4, atol=1e-4)


def test_frozen_blocks_stay_and_so_do_their_statistics(models: dict[str, Path]) -> None:
    trainee = trainee_of(recipe_of(models["resnet"], "freeze"))
    moving = {name for name in trainee.parameters if name.startswith("backbone")}
    assert moving and not [name for name in moving if "stages.0.layers.0" in name or "embedder" in name]
    assert {name for name in trainee.parameters if name.startswith("head")} == {
        f"head.{name}" for name, _ in trainee.parts["head"].named_parameters()
    }
    before = {name: value.clone() for name, value in trainee.parts["backbone"].state_dict().items()}
    (player,) = trainee.players.values()
    player(batch_of(trainee))
    after = trainee.parts["backbone"].state_dict()
    changed = {f"backbone.{name}" for name, value in after.items() if not torch.equal(value, before[name])}
    own = {name for name in trainee.buffers if name.startswith("backbone")}
    assert {name for name in changed if "num_batches" not in name} == own
    assert own == {f"backbone.{name}" for name, _ in iterated(trainee.parts["backbone"])}
    assert trainee.buffers.keys() - own == {"head.standard.running_mean", "head.standard.running_var"}


def test_shapes_are_known_from_configs_alone(models: dict[str, Path]) -> None:
    for tuner, kind in (("head", "diffusion"), ("full", "resnet"), ("freeze", "vit")):
        recipe = recipe_of(models[kind], tuner)
        found = measure(recipe, outline(recipe, "fp32", open_family(recipe.model.source)))
        assert found.trained == sum(value.numel() for value in trainee_of(recipe).parameters.values())


def test_random_weights_are_others(models: dict[str, Path]) -> None:
    stored, fresh = (
        trainee_of(recipe_of(models["resnet"], model={"weights": weights}, train={"seed": 3})).parts
        for weights in ("stored", "random")
    )
    for part in ("backbone", "head"):
        assert not all(torch.equal(a, b) for a, b in zip(first(stored[part]), first(fresh[part]), strict=True))


def first(module: nn.Module) -> list[Tensor]:
    return [value for value in module.state_dict().values() if value.is_floating_point()]


def test_new_heads_stand_on_a_network_that_has_learned(models: dict[str, Path], tmp_path: Path) -> None:
    tasks = {"kind": Task("folder", "class", ("a", "b", "c"))}
    write_classifier(str(models["resnet"]), tasks, tmp_path / "new")
    family, before = open_family(str(tmp_path / "new")), open_family(str(models["resnet"]))
    assert seeing(family).tasks == tasks
    for one, other in zip(first(family.load("backbone")), first(before.load("backbone")), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("kind", "tuner", "sections", "said"),
    [
        ("diffusion", "full", {}, "tuner.type: what .* makes of pictures is frozen; take head"),
        ("pixels", "full", {}, "tuner.type: what .* makes of pictures is frozen; take head"),
        ("resnet", "head", {"objective": {"weights": {"colour": 1}}}, "objective.weights: colour: the model has heads "
                                                                      "for side, things"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_do_is_one_line(
    models: dict[str, Path], kind: str, tuner: str, sections: dict[str, Any], said: str
) -> None:
    recipe = recipe_of(models[kind], tuner, **sections)
    family: Family = open_family(recipe.model.source)
    with pytest.raises(UserError, match=said):
        outline(recipe, "fp32", family)
    with pytest.raises(UserError, match="objective.type: denoise: a model of family .*classifier learns classify"):
        make_objective(parse_recipe({"model": {"source": "x"}, "data": {"source": "y"}}).objective, family)
