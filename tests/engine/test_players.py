"""Two players, two engines, one loop: a GAN learns the same in shares, and goes on from a state in the same bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gtl.config import Recipe, parse_recipe
from gtl.families import open_family
from gtl.objectives.base import Objective
from gtl.storage import Store
from gtl.train import checkpoint
from gtl.train.assemble import Trainee, join
from gtl.train.checkpoint import State
from gtl.train.loop import Lane, train
from gtl.train.plan import TrainPlan
from gtl.train.worker import make_engines
from gtl.tuners import make_tuner
from gtl.types import Batch, Geometry, Item
from tests.engine.group import Group
from tests.tiny import make_gan

SAMPLES, STEPS, COMPARED = 5, 6, 4
"""Of a global batch: odd, so that two ranks get uneven slices. Of a run. Of those, before rounding errors have grown:
the players' game is chaotic."""
PENALISED = {"loss": "hinge", "r1": 2.0, "gradient_penalty": 3.0}
"""An epsilon of 1e-3, or Adam would blow up what rounding leaves of gradients that are 0."""
ADAPTIVE = {"r1": 0.5, "augmentation": {"probability": "adaptive", "target": 0.05, "images": 40}}
PROBABILITIES = [0.0, 5 / 40, 0.0, 0.0]
Outcome = tuple[list[dict[str, float]], dict[str, State], dict[str, Tensor]]


def recipe_of(model: str, objective: dict[str, Any], stage: int) -> Recipe:
    return parse_recipe({
        "model": {"source": model},
        "tuner": {"type": "full"},
        "objective": {"type": "adversarial", "discriminator_learning_rate": 2e-3, **objective},
        "data": {"source": "nowhere", "resolution": 32},
        "train": {
            "steps": STEPS, "batch_size": SAMPLES, "learning_rate": 1e-3, "max_grad_norm": 0.5, "ema": 0.5,
            "optimizer": {"betas": [0.0, 0.99], "eps": 1e-3}, "zero": {"stage": stage},
        },
    })  # fmt: skip


def trainee_of(recipe: Recipe) -> Trainee:
    family = open_family(recipe.model.source)
    return join(recipe, "fp32", family, make_tuner(recipe.tuner, family), "cpu")


def sample(objective: Objective, step: int, index: int) -> dict[str, Tensor]:
    """What the loader draws for a place of a step's batch: of an image of 64 colours."""
    rng = torch.Generator().manual_seed(100 * step + index)
    coarse = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=rng)
    pixels = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    geometry = Geometry(original=(32, 32), crop=(0, 0), target=(32, 32))
    return objective.draw(Item({}, {}, {}, geometry, pixels=pixels), rng)


def batch_of(objective: Objective, step: int, places: list[int]) -> Batch:
    """Samples of a step; of a place that is negative, one without weight."""
    weight = torch.tensor([1 / SAMPLES if place >= 0 else 0.0 for place in places])
    return Batch(objective.collate([sample(objective, step, max(place, 0)) for place in places]), weight)


def batches(objective: Objective, start: int, stop: int) -> Iterator[tuple[int, list[Batch]]]:
    """This rank's micro-batches, two a step."""
    share = -(-SAMPLES // (2 * dist.get_world_size()))
    places = [*range(SAMPLES), *[-1] * (2 * dist.get_world_size() * share - SAMPLES)]
    first = 2 * share * dist.get_rank()
    for step in range(start, stop):
        yield step, [batch_of(objective, step, places[at : at + share]) for at in (first, first + share)]


def run(model: str, folder: str, objective: dict[str, Any], stage: int, start: int, stop: int) -> Outcome:
    """Rows, states and published tensors of the real loop, from a checkpoint in the folder if start > 0."""
    recipe = recipe_of(model, objective, stage)
    trainee = trainee_of(recipe)
    engines = make_engines(trainee, recipe, TrainPlan(STEPS, stage, SAMPLES, 2), torch.device("cpu"))
    store = Store(folder)
    if start:
        key = checkpoint.step_key("checkpoints", start)
        saved = checkpoint.load(store, key, {name: engine.shapes for name, engine in engines.items()})
        for name, engine in engines.items():
            engine.load_state(saved.steps(name), saved.tensors(name))

    def save(step: int) -> None:
        states = {name: engine.state() for name, engine in engines.items()}
        if dist.get_rank() == 0:
            checkpoint.save(store, checkpoint.step_key("checkpoints", step), states, {"step": step})
        dist.barrier()

    rows: list[dict[str, float]] = []
    lane = Lane(seed=3, save_every=100, save=save, report=rows.append, done=start)
    assert train(engines, batches(trainee.objective, start, stop), lane) == stop
    tensors: dict[str, Tensor] = {}
    for engine in engines.values():
        tensors |= engine.weights(ema=True)
    return rows, {name: engine.state() for name, engine in engines.items()}, tensors


def plain(model: str, objective: dict[str, Any]) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The same by hand, on whole batches, with the discriminator itself in the generator's turn."""
    recipe = recipe_of(model, objective, 0)
    trainee = trainee_of(recipe)
    generator, discriminator = trainee.players["generator"], trainee.players["discriminator"]
    rates = {"discriminator": 2e-3, "generator": 1e-3}
    optimizers = {
        name: torch.optim.AdamW(player.parameters(), rates[name], betas=(0.0, 0.99), eps=1e-3, weight_decay=1e-2)
        for name, player in trainee.players.items()
    }
    series = []
    for step in range(COMPARED):
        batch = batch_of(trainee.objective, step, list(range(SAMPLES)))
        row = {}
        for name, player in trainee.players.items():
            if name == "discriminator":
                loss = player(batch).total
            else:
                drawn = generator.network(batch.tensors["noise"][:, 1])
                seen = discriminator.augmented(drawn, batch.tensors["lots"][:, 2])
                logits = discriminator.network(seen)
                kind = recipe.objective.loss  # type: ignore[union-attr]
                loss = (nn.functional.softplus(-logits) if kind == "bce" else -logits).mean()
            optimizers[name].zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(player.parameters(), 0.5)
            optimizers[name].step()
            if name == "discriminator":
                player.after_step(step + 1, STEPS)
            row[f"{name}_loss"] = float(loss.detach())
        series.append(row)
    weights = {name: parameter.detach().clone() for name, parameter in trainee.parameters.items()}
    return series, weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Without spectral normalisation, whose power iterations are as many as there are forward passes."""
    return str(make_gan(tmp_path_factory.mktemp("gan") / "model", normalization="group"))


@pytest.mark.parametrize("objective", [PENALISED, ADAPTIVE], ids=["penalised", "adaptive"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_players_learn_in_shares_what_they_learn_by_hand(
    solo: Group, duo: Group, tmp_path: Path, model: str, objective: dict[str, Any], stage: int
) -> None:
    (rows, states, _), _ = duo.run(run, model, str(tmp_path), objective, stage, 0, COMPARED)
    ((series, weights),) = solo.run(plain, model, objective)
    for row, expected in zip(rows, series, strict=True):
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-5)
    for player, state in states.items():
        for name, kinds in state.tensors.items():
            if name in weights:
                torch.testing.assert_close(kinds["weight"], weights[name], rtol=1e-3, atol=2e-5, msg=f"{player} {name}")
    assert {name for state in states.values() for name in state.tensors} == {*weights, "raised"}
    if objective is ADAPTIVE:
        assert [row["discriminator_augmentation"] for row in rows] == pytest.approx(PROBABILITIES)


@pytest.mark.parametrize(("stage", "network"), [(0, "Conv"), (1, "Residual"), (2, "Conv")])
def test_a_gan_goes_on_in_the_same_bits(duo: Group, tmp_path: Path, stage: int, network: str) -> None:
    model = str(make_gan(tmp_path / "model", kind=network))
    (straight, states, published), _ = duo.run(run, model, str(tmp_path / "straight"), ADAPTIVE, stage, 0, STEPS)
    duo.run(run, model, str(tmp_path / "cut"), ADAPTIVE, stage, 0, 3)
    (rest, again, republished), _ = duo.run(run, model, str(tmp_path / "cut"), ADAPTIVE, stage, 3, STEPS)
    for row, other in zip(straight[3:], rest, strict=True):
        names = [name for name in row if name.startswith(("discriminator", "generator"))]
        assert names and {name: row[name] for name in names} == {name: other[name] for name in names}
    for player, state in states.items():
        assert state.steps == again[player].steps == STEPS
        for name, kinds in state.tensors.items():
            for kind, value in kinds.items():
                assert torch.equal(value, again[player].tensors[name][kind]), (player, name, kind)
    assert published.keys() == republished.keys()
    assert all(torch.equal(value, republished[name]) for name, value in published.items())
    spectra = [name for name in published if name.endswith("._u")]
    assert len(spectra) == {"Conv": 5, "Residual": 15}[network] and "raised" not in published
    averaged = [name for name in published if not torch.equal(published[name], flat(states)[name])]
    assert averaged and all(name.startswith("generator.") for name in averaged)


def in_bf16(model: str, objective: dict[str, Any]) -> tuple[list[float], set[torch.dtype]]:
    """Losses of arithmetic in bf16, and the dtypes that weights and power iterations are kept in."""
    recipe = recipe_of(model, objective, 1)
    family = open_family(model)
    trainee = join(recipe, "bf16", family, make_tuner(recipe.tuner, family), "cpu")
    engines = make_engines(trainee, recipe, TrainPlan(STEPS, 1, SAMPLES, 2), torch.device("cpu"))
    rows: list[dict[str, float]] = []
    lane = Lane(seed=3, save_every=100, save=lambda step: None, report=rows.append)
    train(engines, batches(trainee.objective, 0, 2), lane)
    kept = {tensor.dtype for part in trainee.parts.values() for tensor in (*part.parameters(), *part.buffers())}
    return [row[f"{name}_loss"] for row in rows for name in engines], kept


@pytest.mark.parametrize("kind", ["Conv", "Residual"])
def test_arithmetic_may_be_in_bf16(solo: Group, tmp_path: Path, kind: str) -> None:
    model = str(make_gan(tmp_path / "model", kind=kind))
    ((losses, kept),) = solo.run(in_bf16, model, PENALISED)
    assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses)
    assert kept == {torch.float32}


def flat(states: dict[str, State]) -> dict[str, Tensor]:
    return {name: kinds["weight"] for state in states.values() for name, kinds in state.tensors.items()}
