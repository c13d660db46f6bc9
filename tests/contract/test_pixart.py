"""PixArt: the loss, adapters and pictures of a transformer that predicts noise, against the papers and diffusers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gtl.adapters import apply
from gtl.config.objectives import DenoiseObjective
from gtl.config.tuners import LoraTuner
from gtl.families import open_family
from gtl.generate.engine import Engine
from gtl.generate.images import load_parts
from gtl.objectives import make_objective
from gtl.tuners import make_tuner
from gtl.types import Batch, Geometry, Item
from tests.contract.test_flow import DIFFERENT, SAME, SIZES, Model, distance, draw, ours, publish, request_of, theirs
from tests.tiny import make_pixart, write_json

MODELS = {
    "alpha": make_pixart,
    # Only alpha at 1024 pixels is told the size of a picture, and it is known by its 128 latents a side.
    "alpha-1024": lambda folder: make_pixart(folder, transformer_config={"sample_size": 128}),
    "sigma": lambda folder: make_pixart(folder, sigma=True),
}
TOLD = {"resolution", "aspect_ratio"}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, MODELS[request.param](tmp_path_factory.mktemp(request.param)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_pictures_are_the_pipelines(model: Model, size: tuple[int, int], guidance: float) -> None:
    request = request_of(model, size, guidance)
    assert distance(ours(model, request), theirs(model.pipeline, request)) < SAME


def test_the_size_is_told_to_alpha_at_1024(model: Model) -> None:
    conditions = model.family.size_conditions(Geometry(original=(80, 100), crop=(3, 5), target=(96, 64)))
    expected = {"resolution": torch.tensor([96.0, 64.0]), "aspect_ratio": torch.tensor([1.5])}
    torch.testing.assert_close(conditions, expected if model.name == "alpha-1024" else {})


@pytest.mark.parametrize(("config", "told"), [({"use_additional_conditions": False}, set()), ({}, TOLD)])
def test_what_a_config_says_of_the_size_comes_first(tmp_path: Path, config: dict[str, bool], told: set[str]) -> None:
    """sigma has as many latents a side, and says that it is told nothing."""
    folder = make_pixart(tmp_path, transformer_config={"sample_size": 128})
    file = folder / "transformer" / "config.json"
    write_json(file, json.loads(file.read_text()) | config)
    geometry = Geometry((64, 64), (0, 0), (64, 64))
    assert set(open_family(str(folder)).size_conditions(geometry)) == told


def test_the_loss_is_that_of_the_noise(model: Model) -> None:
    """E |eps(x_t, t) - noise|^2 over the first half of the channels; the variance beside it is not trained."""
    from diffusers import DDPMScheduler

    family, transformer = model.family, model.parts["transformer"]
    rng = torch.Generator().manual_seed(0)
    moments = {name: torch.randn(4, 8, 8, generator=rng) for name in ("mean", "logvar")}
    with torch.no_grad():
        dog, null = family.encode_prompts(model.parts, ["a photo of a dog", ""])
    item = Item(moments, dog, null, Geometry((64, 64), (0, 0), (64, 64)))
    objective = make_objective(DenoiseObjective(caption_dropout=0), family)
    draws = [objective.draw(item, torch.Generator().manual_seed(seed)) for seed in range(3)]
    batch = Batch(objective.collate(draws), torch.tensor([0.5, 0.25, 0.25]))
    loss = objective.players(model.parts, torch.float32)["denoiser"](batch).total
    clean, noise, t = (batch.tensors[name] for name in ("clean", "noise", "t"))
    told = {"resolution": torch.full((3, 2), 64.0), "aspect_ratio": torch.ones(3, 1)}
    ddpm: Any = DDPMScheduler.from_pretrained(model.folder / "scheduler")
    both = transformer(
        ddpm.add_noise(clean, noise, t), timestep=t,
        encoder_hidden_states=dog["encoder_hidden_states"].expand(3, -1, -1),
        encoder_attention_mask=dog["encoder_attention_mask"].expand(3, -1),
        added_cond_kwargs=told if model.name == "alpha-1024" else None,
    ).sample  # fmt: skip
    assert both.shape[1] == 8
    each = (both[:, :4] - noise).pow(2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, (each * batch.weight).sum())


def test_prompts_are_as_long_as_in_their_pipeline(model: Model) -> None:
    (tokens,) = model.family.tokenize(["A photo of a Dog "])
    assert {name: len(value) for name, value in tokens.items()} == dict.fromkeys(
        ("input_ids", "attention_mask"), 300 if model.name == "sigma" else 120
    )
    assert 0 < tokens["attention_mask"].sum() < 10


def test_what_is_masked_is_not_read(model: Model) -> None:
    (dog,) = model.family.encode_prompts(model.parts, ["a photo of a dog"])
    states, mask = dog["encoder_hidden_states"], dog["encoder_attention_mask"]
    assert 0 < mask.sum() < len(mask)
    noise = {**dog, "encoder_hidden_states": torch.where(mask[:, None] == 1, states, states + 5)}
    sizes = model.family.size_conditions(Geometry((64, 64), (0, 0), (64, 64)))
    latents, t = torch.ones(1, 4, 8, 8), torch.tensor([500])
    one, other = (
        model.family.predict(model.parts["transformer"], latents, t, model.family.collate([{**c, **sizes}]))
        for c in (dog, noise)
    )
    torch.testing.assert_close(one, other)


def test_an_adapter_is_read_by_peft(model: Model, tmp_path: Path) -> None:
    """Its pipeline has no loader of adapters, so the transformer is what PEFT puts one on."""
    from diffusers import DiffusionPipeline
    from peft import PeftModel

    publish(model, tmp_path / "adapter", ["transformer"])
    pipeline: Any = DiffusionPipeline.from_pretrained(model.folder)
    pipeline.set_progress_bar_config(disable=True)
    PeftModel.from_pretrained(pipeline.transformer, tmp_path / "adapter")
    request = request_of(model, (64, 64), 3.5)
    plain, drawn = ours(model, request), theirs(pipeline, request)
    assert distance(drawn, plain) > DIFFERENT
    parts = load_parts(model.family, [], device="cpu", dtype=torch.float32)
    apply({"transformer": parts["transformer"]}, tmp_path / "adapter")
    assert distance(draw(Engine(model.family, parts), request), drawn) < SAME


def test_freeze_depth_leaves_the_last_blocks(model: Model) -> None:
    tuner = make_tuner(LoraTuner(rank=2, targets="attention", freeze_depth=0.5), model.family)
    names = list(tuner.apply({"transformer": model.family.load("transformer")}, seed=0))
    assert {name.split(".")[2] for name in names} == {"1", "2"}
    assert {name.split(".")[3] for name in names} == {"attn1", "attn2"}


def test_the_published_tokenizer_is_a_sentencepiece_model(tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    family, prompts = open_family(str(make_pixart(tmp_path / "json"))), ["a dog", "Sks & red, 7!", ""]
    folder = make_pixart(tmp_path / "spiece") / "tokenizer"
    pieces = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    model = sentencepiece_model_pb2.ModelProto()
    for piece, score in pieces:
        model.pieces.add(piece=piece, score=score, type=kinds.get(piece, 1))
    model.trainer_spec.model_type, model.trainer_spec.unk_id = 1, 2
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = True
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    found = open_family(str(tmp_path / "spiece")).tokenize(prompts)
    for one, other in zip(family.tokenize(prompts), found, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
