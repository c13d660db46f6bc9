"""Every allowed pair of tuner and objective, on every family: it learns, and what it publishes is what it learned."""

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtl.adapters import apply
from gtl.adapters.apply import kind_of
from gtl.adapters.merge import merge
from gtl.config import Recipe, parse_recipe
from gtl.config.pairs import PAIRS
from gtl.config.tuners import LoraTuner
from gtl.families import FAMILIES, family_class, open_family
from gtl.families.base import Conditions, DiffusionFamily
from gtl.objectives import OBJECTIVES, make_objective
from gtl.objectives.base import Objective
from gtl.train.assemble import live_parts
from gtl.tuners import TUNERS, make_tuner
from gtl.types import Batch, Geometry, Item, UserError
from tests.contract.test_families import MODELS, VARIANTS, size_of
from tests.overfit import overfit

TUNER_CONFIGS = {
    "lora": {"rank": 8, "alpha": 16, "targets": "all-linear+conv"},
    "full": {},
    "freeze": {"freeze_depth": 0.5},
    "prompt": {"token": "<dog>", "vectors": 4, "initializer": "dog"},
}
OBJECTIVE_CONFIGS = {
    "denoise": {"min_snr_gamma": 5.0}, "autoencode": {}, "consistency": {"solver_steps": 4},
    "distill": {"output": 1e-3, "features": 1e-3}, "align": {"weight": 0.1},
}  # fmt: skip
"""The teacher of distill is the model itself, so that all that is to be learned is the task."""
OWN = {
    "gan": "adversarial", "classifier": "classify", "diffusion_classifier": "classify", "text_classifier": "classify",
}  # fmt: skip
"""Families that no other objective than theirs is for; they are walked in test_gan.py, in test_classifiers.py and in
test_text_heads.py, and what sees an image beside in test_instruct.py."""
FLOW_CONFIGS = {**OBJECTIVE_CONFIGS, "denoise": {"timesteps": {"distribution": "logit_normal", "shift": "model"}}}
"""For models that predict a flow, which has no min-SNR weights."""
CASES = [
    *((tuner, objective, False) for tuner, objective in PAIRS if tuner != "prompt" and objective in OBJECTIVE_CONFIGS),
    *((tuner, "denoise", True) for tuner in ("lora", "full")),
]
"""Every pair that moves the model's weights, and again with the text encoders trained too; words are for themselves."""


def is_long(model: str, place: int) -> bool:
    """Of variants all but the first pair; the full tuning of everything; alignment and fewer steps, but by LoRA and of
    a UNet."""
    tuner, objective, _ = case = CASES[place]
    return case == CASES[-1] or (model in VARIANTS and place > 0) or (
        objective in ("align", "consistency") and tuner != "lora" and model != "sd"
    )  # fmt: skip


WALK = [
    pytest.param(model, *case, marks=pytest.mark.soak if is_long(model, i) else ())
    for i, case in enumerate(CASES) for model in MODELS if case[1] in family_class(MODELS[model][0]).learns
]  # fmt: skip
"""What a family does not learn `make_objective` refuses."""
CAPTIONS = ("a photo of a dog", "a photo of a cat")
FEW = "builtin:scenes?style=neon"
"""Where the second one is from."""
TOKEN_LIMITS = {
    "sd3": {"text_encoder_3": 32}, "flux": {"text_encoder_2": 32}, "flux2": {"text_encoder": 144},
    "flux2_klein": {"text_encoder": 144},
}  # fmt: skip
"""Of models that read the padding too: enough for the captions, and for instructions before them."""
STEPS = {"denoise": 16, "autoencode": 30, "consistency": 30, "distill": 30, "align": 30}
"""Of overfitting, by objective."""
FALLS_TO = 0.6
"""Share of the first loss that overfitting one batch has to reach."""


def test_the_tables_are_walked_whole() -> None:
    assert {*OWN, *(family for family, _ in MODELS.values())} == FAMILIES.keys()
    assert {tuner for tuner, _ in PAIRS} == TUNERS.keys() == {"head", *TUNER_CONFIGS}
    assert {objective for _, objective in PAIRS} == OBJECTIVES.keys() == {*OWN.values(), "instruct", *OBJECTIVE_CONFIGS}


@pytest.mark.parametrize(("model", "tuner_type", "objective_type", "with_encoders"), WALK)
def test_a_pair_overfits_one_batch_and_publishes_what_it_learned(
    tmp_path: Path,
    written: Callable[[str], Path],
    model: str,
    tuner_type: str,
    objective_type: str,
    with_encoders: bool,
) -> None:
    family: Any = open_family(str(written(model)))
    family.token_limits = {**family.token_limits, **TOKEN_LIMITS.get(family.name, {})}
    objectives = FLOW_CONFIGS if family.path.prediction == "flow" else OBJECTIVE_CONFIGS
    train: dict[str, Any] = {"train": [family.main, *family.encoders]} if with_encoders else {}
    if (tuner_type, objective_type) == ("freeze", "align"):
        train = {"freeze_depth": 0.25}  # the middle of a UNet's blocks is behind its middle section
    recipe = parse_recipe({
        "model": {"source": str(family.folder)},
        "data": {"source": [{"source": str(tmp_path)}, {"source": FEW}]},
        "tuner": {"type": tuner_type, **TUNER_CONFIGS[tuner_type], **train},
        "objective": {
            "type": objective_type, **objectives[objective_type],
            **({"teacher": str(family.folder)} if objective_type == "distill" else {}),
            **({"target": FEW} if objective_type == "align" else {}),
        },
    })
    objective, tuner = make_objective(recipe.objective, family), make_tuner(recipe.tuner, family)
    live = live_parts(recipe, family, objective)
    assert live == [objective.parts[0], *(family.encoders if with_encoders else ())]
    parts = {part: family.load(part) for part in live}
    trainable = tuner.apply(parts, seed=0)
    assert {name.partition(".")[0] for name in trainable} == set(live)
    batch = fixed_batch(family, recipe)
    (player,) = objective.players(parts, torch.float32).values()

    losses = overfit(player, list(trainable.values()), batch, STEPS[objective_type])
    assert losses[-1] < FALLS_TO * losses[0]

    tuner.export({key: value.detach().clone() for key, value in trainable.items()}, tmp_path / "adapter")
    fresh = {part: family.load(part) for part in live}
    merged = copy.deepcopy(fresh)
    base = predict(family, fresh, batch)
    apply(fresh, tmp_path / "adapter")
    trained = predict(family, parts, batch)
    assert (trained - base).abs().max() > 0.1
    torch.testing.assert_close(predict(family, fresh, batch), trained, rtol=1e-4, atol=1e-5)
    plain = [set(merged[part].state_dict()) for part in live]
    assert {name.partition(".")[0] for name in merge(merged, ((tmp_path / "adapter", 1.0),))} == set(live)
    assert [set(merged[part].state_dict()) for part in live] == plain
    torch.testing.assert_close(predict(family, merged, batch), trained, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_a_word_overfits_one_batch_and_publishes_what_it_learned(
    tmp_path: Path, written: Callable[[str], Path], model: str
) -> None:
    family = open_family(str(written(model)))
    recipe = parse_recipe(
        {
            "model": {"source": str(family.folder)},
            "data": {"source": str(tmp_path)},
            "tuner": {"type": "prompt", **TUNER_CONFIGS["prompt"]},
        }
    )
    if not family.learns_words:
        with pytest.raises(UserError, match=f"tuner.type: prompt: {family.name}: its text encoders cannot learn words"):
            make_tuner(recipe.tuner, family)
        return
    objective, tuner = make_objective(recipe.objective, family), make_tuner(recipe.tuner, family)
    live = live_parts(recipe, family, objective)
    assert live == [family.main, *family.encoders]
    parts = {part: family.load(part) for part in live}
    trainable = tuner.apply(parts, seed=0)
    assert {name.partition(".")[0] for name in trainable} == set(family.encoders)
    (player,) = objective.players(parts, torch.float32).values()
    batch = fixed_batch(family, recipe, ("a photo of <dog>", "a <dog> on the beach"), objective)
    base = predict(family, parts, batch)

    losses = overfit(player, list(trainable.values()), batch, 8)
    assert sorted(losses, reverse=True) == losses and losses[-1] < 0.999 * losses[0]  # the denoiser itself stays

    tuner.export({key: value.detach().clone() for key, value in trainable.items()}, tmp_path / "adapter")
    fresh = {part: family.load(part) for part in live}
    apply(fresh, tmp_path / "adapter")
    trained = predict(family, parts, batch)
    assert (trained - base).abs().max() > 1e-3
    assert torch.equal(predict(family, fresh, batch), trained)
    with pytest.raises(UserError, match="it is a word beside the model's weights, and cannot be merged into them"):
        merge(fresh, ((tmp_path / "adapter", 1.0),))


@pytest.mark.parametrize("model", ["sd", "sdxl", "sd3"])
def test_a_word_and_an_adapter_learn_at_once(tmp_path: Path, written: Callable[[str], Path], model: str) -> None:
    family = open_family(str(written(model)))
    recipe = parse_recipe({
        "model": {"source": str(family.folder)},
        "data": {"source": str(tmp_path)},
        "tuner": {"type": "lora", **TUNER_CONFIGS["lora"], **TUNER_CONFIGS["prompt"]},
    })
    assert recipe.needs.text == "tokens" and recipe.needs.word == "<dog>" and not recipe.needs.everywhere
    if not family.learns_words:
        with pytest.raises(UserError, match="tuner.token: '<dog>': sd3: its text encoders cannot learn words"):
            make_tuner(recipe.tuner, family)
        return
    objective, tuner = make_objective(recipe.objective, family), make_tuner(recipe.tuner, family)
    live = live_parts(recipe, family, objective)
    parts = {part: family.load(part) for part in live}
    trainable = tuner.apply(parts, seed=0)
    words = {name for name in trainable if ".lora_" not in name}
    assert {name.partition(".")[0] for name in words} == set(family.encoders)
    assert {name.partition(".")[0] for name in trainable.keys() - words} == {family.main}
    (player,) = objective.players(parts, torch.float32).values()
    batch = fixed_batch(family, recipe, ("a photo of <dog>", "a cat on the beach"), objective)
    started = {name: trainable[name].detach().clone() for name in words}
    losses = overfit(player, list(trainable.values()), batch, STEPS["denoise"])
    assert losses[-1] < FALLS_TO * losses[0]
    assert all(not torch.equal(trainable[name], value) for name, value in started.items())

    folder = tmp_path / "adapter"
    tuner.export({key: value.detach().clone() for key, value in trainable.items()}, folder)
    assert kind_of(folder) == "pivotal"
    fresh = {part: family.load(part) for part in live}
    apply(fresh, folder)
    trained = predict(family, parts, batch)
    torch.testing.assert_close(predict(family, fresh, batch), trained, rtol=1e-4, atol=1e-5)
    plain = {part: family.load(part) for part in live}
    with pytest.raises(UserError, match="it has a word beside the model's weights, and cannot be merged into them"):
        merge(plain, ((folder, 1.0),))
    again = {part: family.load(part) for part in live}
    options = {**TUNER_CONFIGS["lora"], "token": "<dog>", "vectors": 4, "init": "dog"}
    goes_on = make_tuner(LoraTuner.model_validate(options), family)
    continued = goes_on.apply(again, seed=1, init=folder)
    assert all(torch.equal(value, trainable[name]) for name, value in continued.items())


def fixed_batch(
    family: DiffusionFamily, recipe: Recipe, captions: Sequence[str] = CAPTIONS, objective: Objective | None = None
) -> Batch:
    """Four samples of two images, drawn once; by an objective of its own if none is given."""
    objective = objective or make_objective(recipe.objective, family)
    height, width = size_of(family)
    if recipe.needs.images == "pixels":
        rng = torch.Generator().manual_seed(0)
        coarse = torch.randint(0, 256, (2, 3, 2, 2), dtype=torch.uint8, generator=rng)
        pictures = coarse.repeat_interleave(height // 2, 2).repeat_interleave(width // 2, 3)
        geometry = Geometry(original=(height, width), crop=(0, 0), target=(height, width))
        return draw_batch(objective, [Item({}, {}, {}, geometry, pixels=picture) for picture in pictures])
    moments, (dog, cat, null) = encoded(family, (*captions, ""))
    geometry = Geometry(original=(height, width), crop=(0, 0), target=(height, width))
    cached = recipe.needs.text == "embeddings"
    items = [
        Item(
            {key: value[i] for key, value in moments.items()}, *(given if cached else ({}, {})), geometry, text,
            is_target=i > 0,
        )
        for i, (text, given) in enumerate(zip(captions, ((dog, null), (cat, null)), strict=True))
    ]
    return draw_batch(objective, items)


@lru_cache
def encoded(family: DiffusionFamily, prompts: tuple[str, ...]) -> tuple[dict[str, Tensor], list[Conditions]]:
    """Moments of two images, and the conditions of prompts."""
    pixels = torch.rand(2, 3, *size_of(family), generator=torch.Generator().manual_seed(0)) * 2 - 1
    codec = family.load(family.codec) if family.codec else None
    encoders = {part: family.load(part) for part in family.encoders}
    with torch.no_grad():
        return family.encode_images(codec, pixels), family.encode_prompts(encoders, prompts)


def draw_batch(objective: Objective, items: list[Item]) -> Batch:
    """Each of two items twice, with other noise."""
    draws = [objective.draw(items[i % 2], torch.Generator().manual_seed(i)) for i in range(4)]
    return Batch(objective.collate(draws), torch.full((4,), 0.25))


def predict(family: DiffusionFamily, parts: dict[str, nn.Module], batch: Batch) -> Tensor:
    """The model's output for the batch's clean latents, or the codec's for its pixels."""
    if "pixels" in batch.tensors:
        with torch.no_grad():
            moments = family.encode_images(parts[str(family.codec)], batch.tensors["pixels"])
            latents = family.sample_latents(moments, batch.tensors["noise"])
            return family.decode(parts[str(family.codec)], latents)
    conditions, tokens = (
        {key.removeprefix(prefix): value for key, value in batch.tensors.items() if key.startswith(prefix)}
        for prefix in ("condition.", "token.")
    )
    with torch.no_grad():
        if tokens:
            conditions |= family.encode_tokens(parts, tokens)
        return family.predict(parts[family.main], batch.tensors["clean"], batch.tensors["t"], conditions)
