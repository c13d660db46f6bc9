"""GANs: the verbs of their family, and both of their pairs, which learn and publish what they learned."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gtl.adapters import apply
from gtl.adapters.base import empty_parts
from gtl.adapters.merge import merge
from gtl.config import Recipe, parse_recipe
from gtl.config.pairs import PAIRS
from gtl.families import denoising, open_family
from gtl.families.base import Family
from gtl.families.gan_backbone import with_backbone
from gtl.families.gan_conv import ConvGenerator, PixelNorm
from gtl.families.gan_features import VggDiscriminator
from gtl.generate.drawing import check
from gtl.generate.images import generate
from gtl.generate.request import Request
from gtl.objectives import live_parts, make_objective
from gtl.train.assemble import Trainee, iterated, join, outline
from gtl.train.footprint import measure
from gtl.tuners import make_tuner
from gtl.types import Batch, Geometry, Item, UserError
from tests.tiny import make_gan, make_sd

TUNERS: dict[str, dict[str, Any]] = {"full": {}, "freeze": {"freeze_depth": 1, "discriminator_depth": 1}}
SIDE = 32


@pytest.fixture(scope="module", params=["Conv", "Residual"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gan(tmp_path_factory.mktemp("gan") / "model", kind=request.param)


def recipe_of(folder: Path, **sections: Any) -> Recipe:
    given = {"tuner": {"type": "full"}, "objective": {"type": "adversarial"}, **sections}
    model = {"source": str(folder), **given.pop("model", {})}
    return parse_recipe({"model": model, "data": {"source": "nowhere", "resolution": SIDE}, **given})


def trainee_of(recipe: Recipe) -> Trainee:
    family = open_family(recipe.model.source)
    return join(recipe, "fp32", family, make_tuner(recipe.tuner, family), "cpu")


def batch_of(trainee: Trainee, samples: int = 8) -> Batch:
    """Of pictures that are bright on the left."""
    geometry = Geometry(original=(SIDE, SIDE), crop=(0, 0), target=(SIDE, SIDE))
    draws = []
    for i in range(samples):
        rng = torch.Generator().manual_seed(i)
        pixels = torch.randint(0, 60, (3, SIDE, SIDE), dtype=torch.uint8, generator=rng)
        pixels[:, :, : SIDE // 2] += 190
        draws.append(trainee.objective.draw(Item({}, {}, {}, geometry, pixels=pixels), rng))
    return Batch(trainee.objective.collate(draws), torch.full((samples,), 1 / samples))


def play(trainee: Trainee, steps: int) -> list[dict[str, float]]:
    """Turns of both players on one batch; the parts of the discriminator's loss."""
    optimizers = {
        name: torch.optim.AdamW([p for p in player.parameters() if p.requires_grad], 5e-3, betas=(0.0, 0.9))
        for name, player in trainee.players.items()
    }
    batch, rows = batch_of(trainee), []
    for _ in range(steps):
        for name, player in trainee.players.items():
            losses = player(batch)
            optimizers[name].zero_grad()
            losses.total.backward()
            optimizers[name].step()
            if losses.parts:
                rows.append({part: float(value) for part, value in losses.parts.items()})
    return rows


def test_the_walk_is_of_all_pairs() -> None:
    assert {tuner for tuner, objective in PAIRS if objective == "adversarial"} == TUNERS.keys()


def test_the_family_is_what_its_folder_says(folder: Path) -> None:
    family = open_family(str(folder))
    assert (family.name, family.main, family.encoders, family.critics) == ("gan", "generator", (), ("discriminator",))
    assert (family.multiple, family.max_size, family.default_size, family.noise_size) == (32, 32, (32, 32), 16)
    assert family.learns == ("adversarial",)
    parts = empty_parts(family)
    assert list(parts) == ["generator", "discriminator"]
    for part in parts.values():
        assert family.blocks(part) == [("blocks.0",), ("blocks.1",), ("blocks.2",)]
        tops = {name.split(".")[0] for name, _ in part.named_parameters()}
        assert tops == {*family.embedders(part), "blocks", "head"}
    generator, discriminator = family.load("generator"), family.load("discriminator")
    noise = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    pixels = generator(noise)
    assert pixels.shape == (3, 3, SIDE, SIDE) and pixels.abs().max() <= 1
    assert discriminator(pixels).shape == (3,)
    assert torch.allclose(generator(noise[1:2])[0], pixels[1], atol=1e-6)  # others in a batch make no difference
    assert {name: value.shape for name, value in family.weights("generator")} == {
        name: value.shape for name, value in generator.state_dict().items()
    }


def test_a_model_is_exported_whole(folder: Path, tmp_path: Path) -> None:
    family = open_family(str(folder))
    generator = family.load("generator")
    with torch.no_grad():
        generator.stem.bias.add_(1)
    family.export({"generator": generator}, tmp_path / "out")
    again = open_family(str(tmp_path / "out"))
    assert torch.equal(again.load("generator").stem.bias, generator.stem.bias)
    assert again.fingerprint("discriminator") == family.fingerprint("discriminator")
    assert again.fingerprint() != family.fingerprint()


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize(
    "objective",
    [
        {"loss": "bce"},
        {"loss": "hinge", "r1": 0.1},
        {"loss": "wasserstein", "gradient_penalty": 1.0, "augmentation": None},
    ],
    ids=lambda config: str(config["loss"]),
)
def test_a_pair_learns_and_publishes_what_it_learned(
    folder: Path, tmp_path: Path, tuner: str, objective: dict[str, Any]
) -> None:
    recipe = recipe_of(folder, tuner={"type": tuner, **TUNERS[tuner]}, objective={"type": "adversarial", **objective})
    trainee = trainee_of(recipe)
    family = trainee.family
    assert live_parts(trainee.objective, family, recipe.needs) == ["generator", "discriminator"]
    base = {name: family.load(name) for name in trainee.parts}
    rows = play(trainee, 60)

    drawn, first = left_minus_right(trainee.parts["generator"]), left_minus_right(base["generator"])
    assert abs(first) < 0.05 and drawn > 0.15  # of real pictures it is 1.49
    assert all(math.isfinite(value) for row in rows for value in row.values())

    tensors = {name: value.detach().clone() for name, value in (trainee.parameters | trainee.buffers).items()}
    trainee.tuner.export(tensors, tmp_path / "adapter")
    for put in (lambda parts, where: apply(parts, where), lambda parts, where: merge(parts, ((where, 1.0),))):
        fresh = {name: family.load(name) for name in trainee.parts}
        put(fresh, tmp_path / "adapter")
        for name, part in fresh.items():
            trained = trainee.parts[name].eval()
            assert all(torch.equal(value, trained.state_dict()[key]) for key, value in part.state_dict().items())
            torch.testing.assert_close(outcome(name, part), outcome(name, trained), rtol=1e-5, atol=1e-5)
            assert not torch.equal(outcome(name, part), outcome(name, base[name].eval()))


def left_minus_right(generator: nn.Module) -> float:
    """Of the mean brightness of drawn pictures."""
    with torch.no_grad():
        pixels = generator(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))
    return float(pixels[..., : SIDE // 2].mean() - pixels[..., SIDE // 2 :].mean())


def outcome(name: str, part: nn.Module) -> Tensor:
    shape = (2, 16) if name == "generator" else (2, 3, SIDE, SIDE)
    with torch.no_grad():
        return part(torch.randn(shape, generator=torch.Generator().manual_seed(2)))


def test_frozen_blocks_of_both_networks_stay(folder: Path, tmp_path: Path) -> None:
    trainee = trainee_of(recipe_of(folder, tuner={"type": "freeze", **TUNERS["freeze"]}))
    moving = {".".join(name.split(".")[:3]).split(".weight")[0].split(".bias")[0] for name in trainee.parameters}
    heads = {name.removesuffix(".parametrizations") for name in moving}
    assert {name for name in heads if name.startswith("generator")} == {
        "generator.blocks.1", "generator.blocks.2", "generator.head.0", "generator.head.2",
    }  # fmt: skip
    assert {name for name in heads if name.startswith("discriminator")} == {
        "discriminator.blocks.1", "discriminator.blocks.2", "discriminator.head",
    }  # fmt: skip
    with pytest.raises(UserError, match="tuner.discriminator_depth: 4: the model has 3 blocks"):
        trainee_of(recipe_of(folder, tuner={"type": "freeze", "freeze_depth": 0, "discriminator_depth": 4}))


def test_random_weights_are_those_of_the_seed_and_not_the_stored_ones(folder: Path) -> None:
    def state(seed: int, weights: str) -> dict[str, Tensor]:
        parts = trainee_of(recipe_of(folder, model={"weights": weights}, train={"seed": seed})).parts
        return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}

    first, again, other, stored = state(1, "random"), state(1, "random"), state(2, "random"), state(1, "stored")
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    for name in ("generator.stem.weight", "discriminator.head.parametrizations.weight.original"):
        assert not torch.equal(first[name], other[name]) and not torch.equal(first[name], stored[name])


def test_the_generators_turn_leaves_the_discriminator_as_it_is(folder: Path) -> None:
    trainee = trainee_of(recipe_of(folder))
    critic = trainee.parts["discriminator"]
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    trainee.players["generator"](batch_of(trainee)).total.backward()
    assert all(parameter.grad is None for parameter in critic.parameters())
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
    assert all(parameter.grad is not None for parameter in trainee.parts["generator"].parameters())
    trainee.parts["generator"].zero_grad(set_to_none=True)
    trainee.players["discriminator"](batch_of(trainee)).total.backward()
    assert all(parameter.grad is None for parameter in trainee.parts["generator"].parameters())
    moved = [name for name, value in critic.state_dict().items() if not torch.equal(value, before[name])]
    assert moved and {name for name, _ in iterated(critic)} >= set(moved)


def test_a_seed_draws_its_picture_in_any_batch(folder: Path) -> None:
    family = open_family(str(folder))
    requests = [Request("", SIDE, SIDE, seed=seed) for seed in range(5)]
    batched = dict(generate(family, requests, max_batch=4))
    (alone,) = [picture for _, picture in generate(family, requests[3:4])]
    assert sorted(batched) == [0, 1, 2, 3, 4]
    assert alone.size == (SIDE, SIDE)
    difference = max(abs(a - b) for a, b in zip(alone.tobytes(), batched[3].tobytes(), strict=True))
    assert difference <= 1
    assert batched[0].tobytes() != batched[1].tobytes()


def test_an_adapter_draws_what_was_learned(folder: Path, tmp_path: Path) -> None:
    trainee = trainee_of(recipe_of(folder))
    play(trainee, 2)
    tensors = {name: value.detach().clone() for name, value in (trainee.parameters | trainee.buffers).items()}
    trainee.tuner.export(tensors, tmp_path / "adapter")
    requests = [Request("", SIDE, SIDE, seed=7)]
    ((_, drawn),) = generate(trainee.family, requests, [(tmp_path / "adapter", 1.0)])
    ((_, base),) = generate(trainee.family, requests)
    assert drawn.tobytes() != base.tobytes()


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request("a dog", SIDE, SIDE), "prompt: 'a dog': a model of family gan draws from noise alone; leave it out"),
        (Request("", 64, 64), "width: 64: this model draws 32x32 only; leave width and height out"),
        (Request("", SIDE, SIDE, seed=-1), r"seed: -1: expected 0 to 2\*\*63 - 1"),
    ],
)
def test_what_it_cannot_draw_is_refused(folder: Path, request_: Request, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(request_, open_family(str(folder)))


def test_what_does_not_go_together_is_refused(folder: Path, tmp_path: Path) -> None:
    gan, diffusion = open_family(str(folder)), open_family(str(make_sd(tmp_path / "sd")))
    adversarial = recipe_of(folder).objective
    denoise = parse_recipe({"model": {"source": "x"}, "data": {"source": "x"}}).objective
    with pytest.raises(UserError, match="objective.type: denoise: a model of family gan learns adversarial"):
        make_objective(denoise, gan)
    with pytest.raises(UserError, match="adversarial: a model of family sd learns denoise or autoencode"):
        make_objective(adversarial, diffusion)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            {"generator": {"channels": [32, 16, 12, 8]}},
            "generator/config.json: not that of a ConvGenerator: channels: 12",
        ),
        ({"generator": {"channels": 32}}, "generator/config.json: channels: missing; expected a list"),
        ({"discriminator": {"normalization": "batch"}}, "normalization: 'batch': expected spectral, group or none"),
        ({"discriminator": {"channels": [8, 16, 15, 32]}}, "channels: 15: expected a multiple of 8"),
        ({"generator": {"noise_size": 17}}, "stem.weight has shape"),
    ],
)
def test_a_damaged_config_is_one_clear_line(tmp_path: Path, damage: dict[str, dict[str, Any]], said: str) -> None:
    folder = make_gan(tmp_path / "model")
    ((part, values),) = damage.items()
    file = folder / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    with pytest.raises(UserError, match=said):
        open_family(str(folder)).load(part)  # some are seen by the first, some by the second


def test_an_unknown_network_is_refused(tmp_path: Path) -> None:
    folder = make_gan(tmp_path / "model")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("ConvDiscriminator", "Critic"))
    with pytest.raises(UserError, match="discriminator: Critic; expected ConvDiscriminator"):
        open_family(str(folder))


def test_a_plan_knows_what_a_gan_takes(folder: Path) -> None:
    recipe = recipe_of(folder, objective={"type": "adversarial", "r1": 1.0})
    family: Family = open_family(str(folder))
    footprint = measure(recipe, outline(recipe, "fp32", family))
    sizes = {part: sum(p.numel() for p in module.parameters()) for part, module in empty_parts(family).items()}
    assert footprint.parts == sizes and footprint.trained == sum(sizes.values())
    assert [block.name for block in footprint.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    assert footprint.per_image.whole > 0 and footprint.work.forward > 0


def test_files_hold_both_networks(folder: Path, tmp_path: Path) -> None:
    trainee = trainee_of(recipe_of(folder))
    tensors = {name: value.detach().clone() for name, value in (trainee.parameters | trainee.buffers).items()}
    trainee.tuner.export(tensors, tmp_path)
    stored = load_file(tmp_path / "delta.safetensors")
    whole = {f"{name}.{key}" for name, part in trainee.parts.items() for key in part.state_dict()}
    assert stored.keys() == whole


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torchvision publishes it: `features`, and a classifier of which nothing is wanted."""
    layers, before = {}, 3
    rng = torch.Generator().manual_seed(0)
    for at, width in zip((0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28), VGG_WIDTHS, strict=True):
        layers[f"features.{at}.weight"] = torch.randn(width, before, 3, 3, generator=rng) / math.sqrt(4.5 * before)
        layers[f"features.{at}.bias"] = torch.randn(width, generator=rng) / 10
        before = width
    file = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save({**layers, "classifier.0.bias": torch.zeros(4096)}, file)
    return file


VGG_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 256, 512, 512, 512, 512, 512)


def test_a_discriminator_sees_by_the_features_of_vgg(vgg: Path, tmp_path: Path) -> None:
    network = VggDiscriminator(side=SIDE)
    network.load_features(vgg)
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    stored, hidden = torch.load(vgg, weights_only=True), (pixels + 1) / 2
    hidden = (hidden - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    for position in range(28):  # as torchvision numbers them
        if position in (4, 9, 18, 27):
            hidden = nn.functional.max_pool2d(hidden, 2)
        elif f"features.{position}.weight" in stored:
            weight, bias = stored[f"features.{position}.weight"], stored[f"features.{position}.bias"]
            hidden = nn.functional.conv2d(hidden, weight, bias, padding=1).relu()
    assert hidden.shape == (2, 512, 2, 2)
    torch.testing.assert_close(network(pixels), network.head(hidden.flatten(1))[:, 0], rtol=1e-4, atol=1e-5)
    assert VggDiscriminator(side=64).head.in_features == 512 * 4 * 4

    folder = make_gan(tmp_path / "model")
    shutil.rmtree(folder / "discriminator")
    network.save_pretrained(folder / "discriminator")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("ConvDiscriminator", "VggDiscriminator"))
    recipe = recipe_of(
        folder, tuner={"type": "freeze", "freeze_depth": 0, "discriminator_depth": 12},
        objective={"type": "adversarial", "r1": 1.0},
    )  # fmt: skip
    trainee = trainee_of(recipe)
    moving = [name for name in trainee.parameters if name.startswith("discriminator")]
    assert moving == ["discriminator.head.weight", "discriminator.head.bias"]
    before = trainee.parts["discriminator"].blocks[0][0].weight.clone()
    rows = play(trainee, 2)
    assert torch.equal(trainee.parts["discriminator"].blocks[0][0].weight, before)
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_weights_that_are_not_vggs_are_refused(vgg: Path, tmp_path: Path) -> None:
    network = VggDiscriminator(side=SIDE)
    with pytest.raises(UserError, match="none.pth: no such file; torchvision publishes it as vgg19-dcbb9e9d.pth"):
        network.load_features(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match="text.pth: not a file of weights"):
        network.load_features(tmp_path / "text.pth")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="list.pth: holds no weights by name"):
        network.load_features(tmp_path / "list.pth")
    stored = torch.load(vgg, weights_only=True)
    torch.save({key: value for key, value in stored.items() if key != "features.19.weight"}, tmp_path / "vgg16.pth")
    with pytest.raises(UserError, match="no features.19.weight in it; expected torchvision's weights of VGG19"):
        network.load_features(tmp_path / "vgg16.pth")
    torch.save({**stored, "features.0.weight": torch.zeros(64, 1, 3, 3)}, tmp_path / "grey.pth")
    with pytest.raises(UserError, match=r"features.0.weight has shape \[64, 1, 3, 3\]; VGG19's is \[64, 3, 3, 3\]"):
        network.load_features(tmp_path / "grey.pth")


def write_backbone(folder: Path, kind: str) -> nn.Module:
    """A network of transformers that sees, with random weights."""
    from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel, ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    if kind == "vit":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
        network: Any = ViTModel(ViTConfig(**sizes, image_size=48, patch_size=8))
        ViTImageProcessor(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    elif kind == "resnet":
        network = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1}
        network = BertModel(BertConfig(**sizes))
    network.save_pretrained(folder)
    return network.eval()


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_discriminator_sees_by_any_network_of_transformers(tmp_path: Path, kind: str) -> None:
    own = write_backbone(tmp_path / kind, kind)
    network = with_backbone(tmp_path / kind, SIDE).eval()
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    if kind == "vit":
        seen = (pixels / 2 + 0.5 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(
            3, 1, 1
        )
        seen = nn.functional.interpolate(seen, (48, 48), mode="bilinear", antialias=True)
        features = own(pixel_values=seen).last_hidden_state.mean(1)
    else:
        features = own(pixel_values=pixels).last_hidden_state.mean((2, 3))
    expected = features @ network.head.weight[0]
    torch.testing.assert_close(network(pixels), expected, rtol=1e-4, atol=1e-6)

    folder = make_gan(tmp_path / "model")
    shutil.rmtree(folder / "discriminator")
    network.save_pretrained(folder / "discriminator")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("ConvDiscriminator", "BackboneDiscriminator"))
    trainee = trainee_of(recipe_of(
        folder, tuner={"type": "freeze", "freeze_depth": 0, "discriminator_depth": 0},
        objective={"type": "adversarial", "loss": "hinge"},
    ))  # fmt: skip
    assert any(name.startswith("discriminator.blocks.0.") for name in trainee.parameters)
    rows = play(trainee, 2)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    part = open_family(str(folder)).load("discriminator").eval()
    torch.testing.assert_close(part(pixels), network(pixels), msg="it is read again as it was written")


def test_networks_that_do_not_see_are_refused(tmp_path: Path) -> None:
    write_backbone(tmp_path / "bert", "bert")
    with pytest.raises(UserError, match="bert: BertModel reads input_ids; one is needed that sees"):
        with_backbone(tmp_path / "bert")
    with pytest.raises(UserError, match="nothing: no network of transformers"):
        with_backbone(tmp_path / "nothing")


def test_networks_of_different_sides_are_refused(tmp_path: Path) -> None:
    folder = make_gan(tmp_path / "model")
    file = folder / "discriminator" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "channels": [8, 16, 32]}))
    with pytest.raises(UserError, match="the generator draws 32 pixels a side, the discriminator sees 16"):
        open_family(str(folder))


def test_what_only_denoising_models_can_do_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="family gan draws at once; this is for models that draw by denoising"):
        denoising(open_family(str(folder)))


def test_normalised_places_keep_what_is_the_same_in_all_of_them() -> None:
    noise = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    norm = PixelNorm(8)
    hidden = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm(hidden).square().mean(1), torch.ones(2, 3, 3))
    torch.testing.assert_close(norm(5 * hidden), norm(hidden))
    generator = ConvGenerator(16, (32, 16, 16, 8), normalization="pixel")
    assert generator(noise).shape == (4, 3, SIDE, SIDE)
    learned = {name for name, _ in generator.named_parameters()}
    assert not learned & {"blocks.0.0.weight", "head.0.weight"}
    with pytest.raises(ValueError, match="normalization: 'batch': expected group or pixel"):
        ConvGenerator(16, (32, 16), normalization="batch")
