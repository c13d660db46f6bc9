"""What drawing a picture takes: counted on shapes, and as it is when a picture is really drawn."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtl.adapters.residents import BASE, Residents
from gtl.config import Recipe
from gtl.config.load import parse_recipe
from gtl.families import denoising, open_family
from gtl.families.base import DiffusionFamily
from gtl.generate.engine import Engine, Output
from gtl.generate.images import load_parts
from gtl.generate.request import Request, sampled_by
from gtl.search.cost import inference_tflops
from gtl.train.flops import Counter
from gtl.train.footprint import CAPTION
from gtl.tuners import make_tuner
from tests.tiny import (
    make_flux,
    make_flux2_klein,
    make_gan,
    make_pixart,
    make_qwen_image,
    make_sana,
    make_sd,
    make_sd3,
    make_sdxl,
    make_z_image,
)

MODELS: dict[str, Callable[[Path], Path]] = {
    "sd": make_sd, "sdxl": make_sdxl, "sd3": make_sd3, "flux": make_flux, "flux2_klein": make_flux2_klein,
    "qwen_image": make_qwen_image, "z_image": make_z_image, "pixart": make_pixart, "sana": make_sana,
}  # fmt: skip
STEPS, GUIDANCE = 3, 4.0


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def family(sd: Path) -> DiffusionFamily:
    return denoising(open_family(str(sd)))


def recipe(model: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": {"source": str(model)}, "data": {"source": "nowhere", "resolution": 64},
        "tuner": {"type": "lora", "rank": 4}, "train": {"steps": 1},
        "evaluate": {"steps": STEPS, "guidance": GUIDANCE}, **changes,
    }  # fmt: skip
    return parse_recipe(values)


def flops(asked: Recipe, adapter: Path | None = None) -> int:
    """Of a picture: a whole number, to the last digit."""
    found = inference_tflops(asked, adapter) * 1e12
    assert found == pytest.approx(round(found), rel=1e-14)
    return round(found)


def drawn(asked: Recipe, family: DiffusionFamily, adapter: Path | None = None) -> int:
    """Operations while an engine with slots really draws a picture; the prompt's encoding is over by then."""
    parts = load_parts(family, [], device="cpu", dtype=torch.float32)
    names = [name for name, module in parts[family.main].named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    residents = Residents(parts, {family.main: names}, 3, 16) if adapter else None
    engine = Engine(family, parts, residents=residents)
    how = asked.evaluate
    negative = CAPTION if family.classifier_free else ""
    request = Request(CAPTION, 64, 64, negative_prompt=negative, steps=how.steps, guidance=how.guidance)
    seat = BASE
    if residents is not None and adapter is not None:
        adapters = ((adapter, 1.0),)
        found = residents.seat(adapters, residents.read(adapters))
        assert found is not None
        seat = found
    engine.add(sampled_by(request, asked.sampler, family), seat)
    finished: list[Output] = []
    with Counter() as counter, torch.no_grad():  # inference mode shows no operators inside of linear layers
        while len(engine):
            finished += inspect.unwrap(Engine.step)(engine)
        inspect.unwrap(Engine.decode)(engine, finished)
    return counter.total


def adapter(asked: Recipe, family: DiffusionFamily, folder: Path) -> Path:
    """What a trial with this recipe would publish; a fresh adapter is as costly as a learned one."""
    learned = family.encoders if asked.tuner.type == "prompt" else asked.tuner.train or [family.main]
    parts = {name: family.load(name) for name in learned}
    tuner = make_tuner(asked.tuner, family)
    tuner.export({name: p.detach() for name, p in tuner.apply(parts, 0).items()}, folder)
    return folder


def rank_costs(family: DiffusionFamily, targets: str) -> int:
    """Operations that one rank adds to a forward pass of two rows: two for each weight and each token it sees."""
    main, found = family.load(family.main), 0
    names = set(family.lora_targets(main, targets))

    def see(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal found
        assert isinstance(module, nn.Linear)
        found += 2 * given[0][..., 0].numel() * (module.in_features + module.out_features)

    for name, module in main.named_modules():
        if name in names:
            module.register_forward_hook(see)
    encoders = {name: family.load(name) for name in family.encoders}
    conditions = family.collate(family.encode_prompts(encoders, [CAPTION] * 2))
    family.predict(main, torch.zeros(2, *family.latent_shape(64, 64)), torch.ones(2), conditions)
    return found


@pytest.mark.parametrize("model", MODELS)
def test_a_picture_on_paper_takes_what_a_drawn_one_does(model: str, tmp_path: Path) -> None:
    made = denoising(open_family(str(MODELS[model](tmp_path / model))))
    asked = recipe(tmp_path / model)
    assert flops(asked) == drawn(asked, made) > 0


def test_a_rank_costs_its_multiply_adds_at_every_step(family: DiffusionFamily, sd: Path, tmp_path: Path) -> None:
    costs = {}
    for rank in (4, 16):
        asked = recipe(sd, tuner={"type": "lora", "rank": rank, "targets": "attention"})
        costs[rank] = flops(asked, adapter(asked, family, tmp_path / str(rank)))
    steps = len(family.sampler(STEPS, 64, 64).timesteps)
    assert steps == STEPS + 1, "PNDM's first step is made of two"
    assert costs[16] - costs[4] == 12 * steps * rank_costs(family, "attention") > 0
    assert costs[4] - flops(recipe(sd)) == 4 * steps * rank_costs(family, "attention")


def test_steps_and_guidance_are_what_a_picture_is_drawn_with(sd: Path) -> None:
    def cost(steps: int, guidance: float) -> int:
        return flops(recipe(sd, evaluate={"steps": steps, "guidance": guidance}))

    many = cost(20, GUIDANCE)
    step, rest = divmod(many - cost(10, GUIDANCE), 10)
    assert rest == 0 and 2 * (many - cost(20, 1.0)) == 21 * step, "without guidance there is one row"


@pytest.mark.parametrize(
    "tuner",
    [
        {"type": "lora", "rank": 3, "targets": "all-linear+conv"},
        {"type": "lora", "rank": 8, "targets": "attention", "train": ["unet", "text_encoder"]},
        {"type": "lora", "rank": 8, "freeze_depth": 0.5},
    ],
)
def test_an_adapter_takes_what_it_does_in_an_endpoint(
    family: DiffusionFamily, sd: Path, tmp_path: Path, tuner: dict[str, Any]
) -> None:
    asked = recipe(sd, tuner=tuner)
    folder = adapter(asked, family, tmp_path)
    only_main = recipe(sd, tuner={**tuner, "train": ["unet"]})
    alone = folder if "train" not in tuner else adapter(only_main, family, tmp_path / "main")
    assert flops(asked, folder) == drawn(only_main, family, alone) > flops(asked)


def test_adapters_in_fewer_layers_take_less(family: DiffusionFamily, sd: Path, tmp_path: Path) -> None:
    costs = []
    for depth in (0.5, 0.8):
        asked = recipe(sd, tuner={"type": "lora", "rank": 8, "targets": "all-linear+conv", "freeze_depth": depth})
        costs.append(flops(asked, adapter(asked, family, tmp_path / str(depth))))
    assert costs[0] > costs[1] > flops(recipe(sd))


@pytest.mark.parametrize(
    "tuner", [{"type": "full"}, {"type": "freeze", "freeze_depth": 0.5}, {"type": "lora", "rank": 4, "dora": True},
              {"type": "prompt", "token": "<it>", "initializer": "dog"}],
)  # fmt: skip
def test_what_takes_the_place_of_weights_costs_nothing_more(
    family: DiffusionFamily, sd: Path, tmp_path: Path, tuner: dict[str, Any]
) -> None:
    asked = recipe(sd, tuner=tuner)
    assert flops(asked, adapter(asked, family, tmp_path)) == flops(recipe(sd))


def test_few_steps_are_learned_without_guidance(family: DiffusionFamily, sd: Path, tmp_path: Path) -> None:
    many = recipe(sd)
    alike, few = (
        recipe(sd, objective={"type": "consistency"}, evaluate={"steps": steps, "guidance": GUIDANCE})
        for steps in (STEPS, 1)
    )
    folder = adapter(many, family, tmp_path)
    costs = [flops(asked, folder) for asked in (few, alike, many)]
    assert costs == [drawn(asked, family, folder) for asked in (few, alike, many)]
    passes = len(family.sampler(STEPS, 64, 64).timesteps)
    step = (costs[1] - costs[0]) // (STEPS - 1)
    assert costs[2] - costs[1] == (2 * passes - STEPS) * step, "the decoder is there once"


def test_a_picture_of_noise_in_one_pass(tmp_path: Path) -> None:
    model = make_gan(tmp_path / "gan")
    asked = recipe(model, tuner={"type": "full"}, objective={"type": "adversarial"}, evaluate={"prompts": []})
    generator = open_family(str(model)).load("generator")
    with Counter() as counter, torch.no_grad():
        generator(torch.zeros(1, 16))
    assert flops(asked) == counter.total > 0
