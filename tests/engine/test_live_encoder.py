"""A whole model with its text encoder under the engine: every stage learns the same, and a state goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gtl.config import parse_recipe
from gtl.config.objectives import DenoiseObjective
from gtl.evaluate.samples import draw_shares
from gtl.families import open_family
from gtl.generate.engine import Request
from gtl.objectives import make_objective
from gtl.train.engine import Engine
from gtl.train.worker import assemble
from gtl.types import Batch, Geometry, Item
from tests.engine.group import Group
from tests.engine.toy import make_train
from tests.tiny import make_sd

PARTS = ["unet", "text_encoder"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sd(tmp_path_factory.mktemp("sd"))


def batch_of(folder: Path, step: int) -> Batch:
    """Two samples of this step; with two ranks each has one of them."""
    objective = make_objective(DenoiseObjective(), open_family(str(folder)))
    rng = torch.Generator().manual_seed(step)
    moments = {"mean": torch.randn(4, 8, 8, generator=rng), "logvar": torch.zeros(4, 8, 8)}
    geometry = Geometry((64, 64), (0, 0), (64, 64))
    draws = [
        objective.draw(Item(moments, {}, {}, geometry, caption), torch.Generator().manual_seed(10 * step + i))
        for i, caption in enumerate(("a dog", "a cat"))
    ]
    mine = draws[dist.get_rank() :: dist.get_world_size()]
    return Batch(objective.collate(mine), torch.full((len(mine),), 0.5))


def run(folder: Path, stage: int, tuner: dict[str, Any]) -> tuple[list[float], list[float], set[str]]:
    """Losses of four steps; those of the last two again, by a fresh engine from the state in between; what moved."""
    recipe = parse_recipe({"model": {"source": str(folder)}, "data": {"source": "s3://b"}, "tuner": tuner})

    def fresh() -> Engine:
        trainee = assemble(recipe, "fp32")
        return Engine(
            trainee.players["denoiser"], trainee.parameters, make_train(learning_rate=1e-3), stage=stage, micro_batch=1,
            accumulation=1, device="cpu", total_steps=4,
        )  # fmt: skip

    def steps(engine: Engine, start: int, stop: int) -> list[float]:
        losses = []
        for step in range(start, stop):
            total = engine(batch_of(folder, step)).total
            engine.backward(total)
            engine.step()
            total = total.detach()
            dist.all_reduce(total)
            losses.append(total.item())
        return losses

    engine = fresh()
    before = engine.weights()
    first = steps(engine, 0, 2)
    states = [engine.state()]
    dist.broadcast_object_list(states)  # every rank loads all of it
    last = steps(engine, 2, 4)
    moved = {name for name, value in engine.weights().items() if not torch.equal(value, before[name])}
    again = fresh()
    again.load_state(states[0])
    return first + last, steps(again, 2, 4), moved


@pytest.mark.parametrize("tuner", [{"type": "full", "train": PARTS}, {"type": "lora", "rank": 2, "train": PARTS}])
def test_stages_agree_and_a_state_goes_on(solo: Group, duo: Group, model: Path, tuner: dict[str, Any]) -> None:
    losses, resumed, moved = solo.run(run, model, 0, tuner)[0]
    assert len(set(losses)) == 4 and resumed == losses[2:]
    assert {name.partition(".")[0] for name in moved} == set(PARTS)
    for stage in (0, 3):
        sharded, sharded_resumed, sharded_moved = duo.run(run, model, stage, tuner)[0]
        assert sharded == pytest.approx(losses, rel=1e-4)
        assert sharded_resumed == sharded[2:]
        assert sharded_moved == moved


def draw_together(folder: Path, stage: int) -> list[bytes]:
    """Pixels of three prompts, of which two are the same, by the encoder that is trained."""
    recipe = parse_recipe({
        "model": {"source": str(folder)}, "data": {"source": "s3://b"}, "tuner": {"type": "full", "train": PARTS},
    })
    trainee = assemble(recipe, "fp32")
    engine = Engine(
        trainee.players["denoiser"], trainee.parameters, make_train(), stage=stage, micro_batch=1, accumulation=1,
        device="cpu", total_steps=4,
    )  # fmt: skip
    parts = {**trainee.parts, "vae": trainee.family.load("vae")}
    requests = [Request(prompt, 64, 64, steps=2, seed=i) for i, prompt in enumerate(("a dog", "a cat", "a dog"))]
    with engine.evaluating():
        images = draw_shares(
            trainee.family, parts, requests, encoded=None, device=torch.device("cpu"), dtype=torch.float32
        )
    return [image.tobytes() for image in images]


def test_ranks_whose_pictures_have_fewer_texts_keep_step(solo: Group, duo: Group, model: Path) -> None:
    alone = solo.run(draw_together, model, 0)[0]
    assert len(set(alone)) == 3
    together, nothing = duo.run(draw_together, model, 3)
    assert nothing == []
    for a, b in zip(alone, together, strict=True):
        difference = torch.frombuffer(bytearray(a), dtype=torch.uint8).int() - torch.frombuffer(
            bytearray(b), dtype=torch.uint8
        )
        assert difference.abs().max() <= 1
