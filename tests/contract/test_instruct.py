"""Editing by instructions: what is learned is what is published, diffusers draws the same of it, and nothing else can
use it by mistake."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gtl.adapters import Card, Registry, apply
from gtl.adapters.card import base_of
from gtl.adapters.channels import CHANNELS, write_channels
from gtl.adapters.commands import export_pipeline, fuse_adapters
from gtl.adapters.formats import LoraExport, write_lora
from gtl.adapters.residents import Residents
from gtl.config import parse_recipe
from gtl.evaluate.run import find
from gtl.families import open_family
from gtl.families.wide import is_wide
from gtl.generate.command import run as generate
from gtl.generate.edit import Edit
from gtl.generate.edit_command import run as edit
from gtl.generate.engine import Engine
from gtl.generate.images import load_parts
from gtl.generate.request import Request
from gtl.images import read_recipe
from gtl.objectives import make_objective
from gtl.objectives.instruct import show_originals
from gtl.train.assemble import live_parts
from gtl.tuners import make_tuner
from gtl.types import Geometry, Item, UserError
from tests.contract.test_families import SIZE
from tests.contract.test_pairs import TUNER_CONFIGS, draw_batch, encoded, overfit
from tests.loras import load_unet, random_lora
from tests.tiny import make_sd, make_sdxl
from tests.unit.test_edit import picture, right_half
from tests.unit.test_generate import drain, with_ddim

MODELS = ("sd", "sdxl")
ASKED = Request("make it red", 64, 64, negative_prompt="blurry", seed=7, steps=4, guidance=6.0)
SAME = 1e-4


def seen(family: Any, main: Any, batch: Any) -> Tensor:
    """The model's output, for the batch's clean latents and what it is shown."""
    tensors = batch.tensors
    conditions = {k.removeprefix("condition."): v for k, v in tensors.items() if k.startswith("condition.")}
    with torch.no_grad():
        shown = torch.cat([tensors["clean"], tensors["original"]], 1)
        found: Tensor = family.predict(main, shown, tensors["t"], conditions)
    return found


@pytest.mark.parametrize("tuner_type", ["lora", "full"])
@pytest.mark.parametrize("model", MODELS)
def test_a_pair_overfits_one_batch_and_publishes_what_it_learned(
    tmp_path: Path, written: Callable[[str], Path], model: str, tuner_type: str
) -> None:
    family: Any = open_family(str(written(model)))
    recipe = parse_recipe({
        "model": {"source": str(family.folder)}, "data": {"source": str(tmp_path)},
        "tuner": {"type": tuner_type, **TUNER_CONFIGS[tuner_type]}, "objective": {"type": "instruct"},
    })  # fmt: skip
    objective, tuner = make_objective(recipe.objective, family), make_tuner(recipe.tuner, family)
    assert live_parts(recipe, family, objective) == ["unet"]
    plain = family.load("unet")
    parts = {"unet": family.load("unet")}
    show_originals(family, parts["unet"])
    trainable = tuner.apply(parts, seed=0)
    assert "unet.conv_in.added" in trainable and trainable["unet.conv_in.added"].shape[1] == 4
    moments, (red, big, null) = encoded(family, ("make it red", "make it large", ""))
    geometry = Geometry(original=SIZE, crop=(0, 0), target=SIZE)
    items = [
        Item(
            {k: v[i] for k, v in moments.items()}, given, null, geometry, "",
            original={k: v[1 - i] for k, v in moments.items()},
        )
        for i, given in enumerate((red, big))
    ]  # fmt: skip
    batch = draw_batch(objective, items)
    (player,) = objective.players(parts, torch.float32).values()
    with torch.no_grad():  # channels of zeros: before it learns, it is the model that it was
        conditions = {k.removeprefix("condition."): v for k, v in batch.tensors.items() if k.startswith("condition.")}
        before = family.predict(plain, batch.tensors["clean"], batch.tensors["t"], conditions)
    torch.testing.assert_close(seen(family, parts["unet"], batch), before, rtol=1e-5, atol=1e-5)

    losses = overfit(player, list(trainable.values()), batch, 20)
    assert losses[-1] < 0.6 * losses[0]
    assert trainable["unet.conv_in.added"].abs().max() > 1e-3

    tuner.export({key: value.detach().clone() for key, value in trainable.items()}, tmp_path / "adapter")
    assert (tmp_path / "adapter" / CHANNELS).is_file()
    fresh = {"unet": family.load("unet")}
    apply(fresh, tmp_path / "adapter")
    trained = seen(family, parts["unet"], batch)
    torch.testing.assert_close(seen(family, fresh["unet"], batch), trained, rtol=1e-4, atol=1e-5)
    other = copy.copy(batch)
    other.tensors["original"] = batch.tensors["original"].flip(-1)
    assert (seen(family, fresh["unet"], other) - trained).abs().max() > 1e-3, "it sees the image"

    again = {"unet": family.load("unet")}
    show_originals(family, again["unet"])
    goes_on = make_tuner(recipe.tuner, family).apply(again, 0, init=tmp_path / "adapter")
    assert torch.equal(goes_on["unet.conv_in.added"], trainable["unet.conv_in.added"])
    blind = {"unet": family.load("unet")}  # of an objective that shows it no image
    assert "unet.conv_in.added" not in make_tuner(recipe.tuner, family).apply(blind, 0, init=tmp_path / "adapter")


def test_image_caption_and_both_are_dropped_as_often_as_asked(written: Callable[[str], Path], tmp_path: Path) -> None:
    family: Any = open_family(str(written("sd")))
    recipe = parse_recipe({
        "model": {"source": str(family.folder)}, "data": {"source": str(tmp_path)},
        "objective": {"type": "instruct", "caption_dropout": 0.1, "image_dropout": 0.2, "both_dropout": 0.3},
    })  # fmt: skip
    objective = make_objective(recipe.objective, family)
    one, latents = torch.ones(1, 2), {"mean": torch.ones(4, 8, 8), "logvar": torch.zeros(4, 8, 8)}
    given, null = {"encoder_hidden_states": one}, {"encoder_hidden_states": 0 * one}
    item = Item(latents, given, null, Geometry((64, 64), (0, 0), (64, 64)), original=latents)
    rng = torch.Generator().manual_seed(0)
    counts: dict[tuple[bool, bool], int] = {}
    for _ in range(1500):
        sample = objective.draw(item, rng)
        key = bool(sample["original"].any()), bool(sample["condition.encoder_hidden_states"].any())
        counts[key] = counts.get(key, 0) + 1
    shares = {key: count / 1500 for key, count in counts.items()}
    expected = {(True, False): 0.1, (False, True): 0.2, (False, False): 0.3, (True, True): 0.4}
    assert shares == pytest.approx(expected, abs=0.04)
    assert objective.draw(item, rng, stratum=1)["original"].all(), "validation drops nothing"


def test_what_is_dropped_adds_up_to_one_at_most(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="caption_dropout, image_dropout and both_dropout add up to 1.05; at most 1"):
        parse_recipe({
            "model": {"source": "builtin:tiny"}, "data": {"source": str(tmp_path)},
            "objective": {"type": "instruct", "image_dropout": 0.5, "both_dropout": 0.5},
        })  # fmt: skip


def test_only_models_that_read_latents_by_a_convolution_learn_it(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    family = open_family(str(written("sd3")))
    recipe = parse_recipe({
        "model": {"source": str(family.folder)}, "data": {"source": str(tmp_path)}, "objective": {"type": "instruct"},
    })  # fmt: skip
    with pytest.raises(UserError, match="^objective.type: instruct: a model of family sd3 learns denoise or"):
        make_objective(recipe.objective, family)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_ddim(make_sd(tmp_path_factory.mktemp("sd")))


def publish(sd: Path, registry: Registry, name: str, *, edits: bool, seed: int = 1) -> Path:
    """A LoRA, and with `edits` weights for the image."""
    folder = sd.parent / f"{name}-files"
    unet: Any = load_unet(sd)
    write_lora(random_lora(unet, "unet", seed=seed, only=".attentions."), folder, config=LoraExport(4, 4))
    if edits:
        rng = torch.Generator().manual_seed(seed)
        write_channels({"unet.conv_in.added": 0.3 * torch.randn(16, 4, 3, 3, generator=rng)}, folder)
    card = Card(
        name=name, version="v1", base=base_of(open_family(str(sd)), str(sd)), tuner={"type": "lora", "rank": 4},
        objective={"type": "instruct" if edits else "denoise"},
    )  # fmt: skip
    registry.publish(name, "v1", folder, card)
    return folder


@pytest.fixture(scope="module")
def registry(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    registry = Registry(str(tmp_path_factory.mktemp("registry")))
    publish(sd, registry, "editor", edits=True)
    publish(sd, registry, "other", edits=True, seed=2)
    publish(sd, registry, "style", edits=False, seed=3)
    return registry


def ours(sd: Path, adapters: list[tuple[Path, float]], request: Request, start: Edit) -> Tensor:
    family: Any = open_family(str(sd))
    engine = Engine(family, load_parts(family, adapters, device="cpu", dtype=torch.float32))
    handle = engine.add(request, edit=start)
    return drain(engine)[handle]


@pytest.mark.parametrize(("guidance", "image_guidance"), [(6.0, 1.5), (6.0, 1.0), (1.0, 1.0)])
def test_a_whole_model_draws_the_same_in_diffusers(
    sd: Path, registry: Registry, tmp_path: Path, guidance: float, image_guidance: float
) -> None:
    from dataclasses import replace

    from diffusers import DiffusionPipeline

    export_pipeline(registry.store.root, "editor", tmp_path / "whole")
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    assert type(pipeline).__name__ == "StableDiffusionInstructPix2PixPipeline"
    assert pipeline.unet.config.in_channels == 8
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        ASKED.prompt, image=picture(), num_inference_steps=ASKED.steps, guidance_scale=guidance,
        image_guidance_scale=image_guidance, negative_prompt=ASKED.negative_prompt, output_type="pt",
        generator=torch.Generator().manual_seed(ASKED.seed),
    ).images[0]  # fmt: skip
    folder = registry.fetch("editor@v1")
    request = replace(ASKED, guidance=guidance)
    drawn = ours(sd, [(folder, 1.0)], request, Edit(picture(), image_guidance=image_guidance))
    assert (drawn - expected).abs().max() < SAME
    assert expected.std() > 0.05
    upside_down = Edit(picture().rotate(180), image_guidance=image_guidance)
    assert (ours(sd, [(folder, 1.0)], request, upside_down) - expected).abs().mean() > 0.003


def test_so_does_one_of_stable_diffusion_xl(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    folder, registry = make_sdxl(tmp_path / "sdxl"), Registry(str(tmp_path / "registry"))
    publish(folder, registry, "editor", edits=True)
    export_pipeline(registry.store.root, "editor", tmp_path / "whole")
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    assert type(pipeline).__name__ == "StableDiffusionXLInstructPix2PixPipeline"
    pipeline.set_progress_bar_config(disable=True)
    pipeline.watermark = None
    expected = pipeline(
        ASKED.prompt, image=picture(), height=64, width=64, num_inference_steps=ASKED.steps, guidance_scale=6.0,
        image_guidance_scale=1.5, negative_prompt=ASKED.negative_prompt, output_type="pt",
        generator=torch.Generator().manual_seed(ASKED.seed),
    ).images[0]  # fmt: skip
    drawn = ours(folder, [(registry.fetch("editor@v1"), 1.0)], ASKED, Edit(picture(), image_guidance=1.5))
    assert (drawn - expected).abs().max() < SAME
    assert expected.std() > 0.05


def test_the_command_follows_the_card(sd: Path, registry: Registry, tmp_path: Path) -> None:
    picture().save(tmp_path / "photo.png")
    options: dict[str, Any] = {"registry": registry.store.root, "steps": 3, "prompt": "make it red"}
    files = edit(tmp_path / "photo.png", out=tmp_path / "a", adapters=["editor", "style:0.5"], **options)
    assert read_recipe(files[0])["edit"]["image_guidance"] == 1.5
    right_half().save(tmp_path / "mask.png")
    (kept,) = edit(tmp_path / "photo.png", out=tmp_path / "b", adapters=["editor"], mask=tmp_path / "mask.png",
                   image_guidance=3.0, **options)  # fmt: skip
    from PIL import Image

    assert Image.open(kept).crop((0, 0, 32, 64)).tobytes() == picture().crop((0, 0, 32, 64)).tobytes()


@pytest.mark.parametrize(
    ("adapters", "options", "message"),
    [
        (["editor"], {"strength": 0.5}, "--strength: 0.5: editor@v1 was taught to edit: it sees the image and begins"),
        (["style"], {"image_guidance": 2.0}, "--image-guidance: 2: no --adapter was taught to edit; leave it out"),
        (["editor"], {"image_guidance": 0.5}, "--image-guidance: 0.5: expected a number >= 1; 1 is no guidance"),
    ],
)
def test_an_option_for_the_other_way_is_refused(
    registry: Registry, tmp_path: Path, adapters: list[str], options: dict[str, Any], message: str
) -> None:
    picture().save(tmp_path / "photo.png")
    with pytest.raises(UserError) as error:
        edit(tmp_path / "photo.png", out=tmp_path / "out", adapters=adapters, prompt="make it red",
             registry=registry.store.root, **options)  # fmt: skip
    assert str(error.value).startswith(message)


def test_what_draws_of_prompts_alone_refuses_it(sd: Path, registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--adapter editor@v1: was taught to edit images; give it one by gtl edit"):
        generate(out=tmp_path, adapters=["editor"], prompt="a dog", registry=registry.store.root)
    base = open_family(str(sd)).fingerprint()
    with pytest.raises(UserError, match=r"^--adapter editor: was taught to edit images, and these metrics are of"):
        find(registry, "editor", base)
    assert find(registry, "editor", base, draws=False).name == "editor@v1"
    with pytest.raises(UserError, match=r"^adapter editor@v1: it was taught to edit an image that it is shown"):
        fuse_adapters(registry.store.root, ["editor", "style"], "both")
    family: Any = open_family(str(sd))
    engine = Engine(family, load_parts(family, [(registry.fetch("editor@v1"), 1.0)], device="cpu", dtype=torch.float32))
    with pytest.raises(UserError, match=r"^adapters: one was taught to edit an image that it is shown"):
        engine.add(ASKED)
    plain = Engine(family, load_parts(family, [], device="cpu", dtype=torch.float32))
    with pytest.raises(UserError, match=r"^image_guidance: no adapter here was taught to edit"):
        plain.add(ASKED, edit=Edit(picture(), image_guidance=1.5))
    assert len(engine) == len(plain) == 0


def test_several_add_up_and_none_of_it_stays_where_it_does_not_fit(
    sd: Path, registry: Registry, tmp_path: Path
) -> None:
    unet: Any = load_unet(sd)
    for name, scale in (("editor", 1.0), ("other", -0.5)):
        apply({"unet": unet}, registry.fetch(f"{name}@v1"), name, scale)
    one, two = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    expected = 0.3 * torch.randn(16, 4, 3, 3, generator=one) - 0.15 * torch.randn(16, 4, 3, 3, generator=two)
    torch.testing.assert_close(unet.conv_in.added.data, expected)
    wrong: Any = load_unet(sd)
    folder = tmp_path / "wrong"
    write_lora(random_lora(wrong, "unet", only=".attentions."), folder, config=LoraExport(4, 4))
    for name, message in (("unet.conv_in.added", "has shape"), ("unet.nowhere.added", "the model has no such layer")):
        write_channels({name: torch.zeros(16, 4, 1, 1)}, folder)
        with pytest.raises(UserError, match=message):
            apply({"unet": wrong}, folder)
        assert not is_wide(wrong) and not hasattr(wrong, "peft_config")
    everywhere = tmp_path / "everywhere"
    write_lora(random_lora(wrong, "unet"), everywhere, config=LoraExport(4, 4))
    with pytest.raises(UserError, match=r"it has a low-rank update of unet\.conv_in, which is to read an image too"):
        apply({"unet": unet}, everywhere, "third")
    apply({"unet": wrong}, everywhere)
    with pytest.raises(UserError, match="conv_in: has an adapter on it"):
        apply({"unet": wrong}, registry.fetch("editor@v1"), "second")
    assert not is_wide(wrong)


def test_in_an_engine_for_many_it_has_passes_of_its_own(sd: Path, registry: Registry) -> None:
    """Beside plain requests and others' adapters each draws what it draws alone."""
    family: Any = open_family(str(sd))
    parts = load_parts(family, (), device="cpu", dtype=torch.float32)
    targets = {"unet": family.lora_targets(parts["unet"], "all-linear+conv")}
    residents = Residents({"unet": parts["unet"]}, targets, 4, 8)
    engine = Engine(family, parts, residents=residents)
    editor, style = (((registry.fetch(f"{name}@v1"), 1.0),) for name in ("editor", "style"))
    handles = {}
    for name, adapters, start in (
        ("plain", (), None), ("styled", style, None), ("edited", editor, Edit(picture(), image_guidance=1.5)),
        ("begun", style, Edit(picture(), strength=0.5)),
    ):  # fmt: skip
        loaded = residents.read(adapters) if adapters else None
        seat = residents.seat(adapters, loaded) if loaded else None
        handles[name] = engine.add(ASKED, **({"seat": seat} if seat else {}), edit=start)
        if name == "edited":
            assert seat is not None and seat.edits and seat.company
    drawn = drain(engine)
    for name, adapters, start in (("edited", editor, Edit(picture(), image_guidance=1.5)), ("plain", (), None)):
        alone = ours(sd, list(adapters), ASKED, start)  # type: ignore[arg-type]
        assert (drawn[handles[name]] - alone).abs().max() < SAME, name
    seat = residents.seat(editor, residents.read(editor))
    assert seat is not None
    with pytest.raises(UserError, match=r"^adapters: one was taught to edit"):
        engine.add(ASKED, seat)
    assert residents.seat(editor, residents.read(editor)) is not None, "whoever is refused leaves its seat"
