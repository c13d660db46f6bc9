"""A whole model with its text encoder under the engine: every stage learns the same, and a state goes on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gtl.config import parse_recipe
from gtl.config.objectives import DenoiseObjective
from gtl.evaluate.samples import draw_share, gather
from gtl.families import open_family
from gtl.generate.request import Request
from gtl.objectives import make_objective
from gtl.train.assemble import Trainee, assemble
from gtl.train.engine import Engine
from gtl.types import Batch, Geometry, Item
from tests.engine.group import Group
from tests.engine.toy import descend, make_train
from tests.tiny import make_sd

PARTS = ["unet", "text_encoder"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sd(tmp_path_factory.mktemp("sd"))


def batch_of(folder: Path, step: int, trainee: Trainee | None = None) -> Batch:
    """Two samples of this step; with two ranks each has one of them. One's own words only its own objective knows."""
    objective = make_objective(DenoiseObjective(), open_family(str(folder))) if trainee is None else trainee.objective
    rng = torch.Generator().manual_seed(step)
    moments = {"mean": torch.randn(4, 8, 8, generator=rng), "logvar": torch.zeros(4, 8, 8)}
    geometry = Geometry((64, 64), (0, 0), (64, 64))
    draws = [
        objective.draw(Item(moments, {}, {}, geometry, caption), torch.Generator().manual_seed(10 * step + i))
        for i, caption in enumerate(("a dog", "a cat") if trainee is None else ("a photo of <dog>", "a <dog>"))
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
        return [loss for loss, _ in descend(engine, ([batch_of(folder, step)] for step in range(start, stop)))]

    engine = fresh()
    before = engine.weights()
    first = steps(engine, 0, 2)
    states = [engine.state()]
    dist.broadcast_object_list(states)  # every rank loads all of it
    last = steps(engine, 2, 4)
    moved = {name for name, value in engine.weights().items() if not torch.equal(value, before[name])}
    again = fresh()
    again.load_state(states[0].steps, states[0].tensors.items())
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


def run_word(folder: Path, stage: int) -> tuple[list[float], list[float], list[str]]:
    """Losses of four steps of a word; those of the last two again, from the state in between; what moved."""
    tuner = {"type": "prompt", "token": "<dog>", "vectors": 2, "initializer": "dog"}
    recipe = parse_recipe({"model": {"source": str(folder)}, "data": {"source": "s3://b"}, "tuner": tuner})

    def fresh() -> tuple[Trainee, Engine]:
        trainee = assemble(recipe, "fp32")
        return trainee, Engine(
            trainee.players["denoiser"], trainee.parameters, make_train(learning_rate=1e-1), stage=stage, micro_batch=1,
            accumulation=1, device="cpu", total_steps=4,
        )  # fmt: skip

    def steps(trainee: Trainee, engine: Engine, start: int, stop: int) -> list[float]:
        batches = ([batch_of(folder, step, trainee)] for step in range(start, stop))
        return [loss for loss, _ in descend(engine, batches)]

    trainee, engine = fresh()
    before = engine.weights()
    first = steps(trainee, engine, 0, 2)
    states = [engine.state()]
    dist.broadcast_object_list(states)  # every rank loads all of it
    last = steps(trainee, engine, 2, 4)
    moved = [name for name, value in engine.weights().items() if not torch.equal(value, before[name])]
    again, engine = fresh()
    engine.load_state(states[0].steps, states[0].tensors.items())
    return first + last, steps(again, engine, 2, 4), moved


def test_a_word_is_learned_the_same_in_shares(solo: Group, duo: Group, model: Path) -> None:
    losses, resumed, moved = solo.run(run_word, model, 0)[0]
    assert len(set(losses)) == 4 and resumed == losses[2:]
    assert moved == ["text_encoder.embeddings.token_embedding.learned_0"]
    for stage in (0, 3):
        sharded, sharded_resumed, sharded_moved = duo.run(run_word, model, stage)[0]
        assert sharded == pytest.approx(losses, rel=1e-4)
        assert sharded_resumed == sharded[2:]
        assert sharded_moved == moved


def run_changed(folder: Path, stage: int, change: str | None) -> tuple[list[float], int, int]:
    """Losses of three steps of a LoRA; how often the last ResNet ran, and how many graphs were compiled."""
    recipe = parse_recipe({
        "model": {"source": str(folder)}, "data": {"source": "s3://b", "buckets": False},
        "tuner": {"rank": 2, "train": PARTS},
        "train": {"learning_rate": 1e-2, **({change: True} if change else {})},
    })  # fmt: skip
    graphs, runs = 0, 0

    def keep(graph: Any, _: Any) -> Any:  # as the backend `eager` does: what a compiler makes of it is its own affair
        nonlocal graphs
        graphs += 1
        return graph.forward

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    compile_ = nn.Module.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda self, **more: compile_(self, backend=keep, **more))
        patch.setenv("CXX", sys.executable)  # no compiler is needed, and one is looked for
        torch._dynamo.reset()
        trainee = assemble(recipe, "fp32")
        if change != "compile":  # which a hook would cut in two
            trainee.parts["unet"].get_submodule("up_blocks.0.resnets.1.norm1").register_forward_hook(count)
        engine = Engine(
            trainee.players["denoiser"], trainee.parameters, recipe.train, stage=stage, micro_batch=1, accumulation=1,
            device="cpu", total_steps=3,
        )  # fmt: skip
        losses = []
        for step in range(3):
            total = engine(batch_of(folder, step)).total
            engine.backward(total)
            engine.step()
            losses.append(total.item())
    return losses, runs, graphs


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one level, since capturing a graph takes a while: three ResNets and three transformer blocks."""
    level = {"block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock2D",), "attention_head_dim": (2,),
             "up_block_types": ("CrossAttnUpBlock2D",), "mid_block_type": None}  # fmt: skip
    return make_sd(tmp_path_factory.mktemp("short"), unet_config=level)


@pytest.mark.parametrize(
    ("stage", "change"),
    # Not compiled at stage 3: there DeepSpeed's hooks are captured too, module by module, which takes minutes.
    [(0, "activation_checkpointing"), (3, "activation_checkpointing"), (0, "compile")],
)
def test_checkpointed_and_compiled_blocks_learn_the_same(duo: Group, short: Path, stage: int, change: str) -> None:
    plain, once, none = duo.run(run_changed, short, stage, None)[0]
    assert len(set(plain)) == 3 and (once, none) == (3, 0)
    changed, runs, graphs = duo.run(run_changed, short, stage, change)[0]
    assert changed == plain
    if change == "compile":
        assert graphs >= 2  # a ResNet's and a transformer block's
    else:
        assert (runs, graphs) == (6, 0)


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
        mine = draw_share(
            trainee.family, parts, requests, encoded=None, device=torch.device("cpu"), dtype=torch.float32
        )
        images = gather(mine, len(requests))
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
