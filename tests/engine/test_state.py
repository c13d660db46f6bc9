"""State: bit-for-bit resume, any stage and world size, EMA, fp32 masters, 8-bit moments."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gtl.storage import Store
from gtl.train import checkpoint
from gtl.train.checkpoint import State
from gtl.train.engine import Engine
from gtl.train.loop import Lane, train
from gtl.train.optimizer import make_optimizer
from gtl.train.schedule import ema_decay
from gtl.types import UserError
from tests.engine.group import Group
from tests.engine.toy import Toy, batches, make_engine, make_train

STAGES = [0, 1, 2, 3]
NAMES = ["scale", "conv.weight", "conv.bias", "head.weight", "head.bias"]
Outcome = tuple[list[dict[str, float]], State]


def run(folder: str, stage: int, start: int, stop: int, settings: dict[str, Any], save_every: int = 100) -> Outcome:
    """Rows and final state of the real loop, from a checkpoint in the folder if start > 0."""
    player = Toy()
    player.dropout.p = 0.25
    engine = make_engine(player, make_train(**settings), stage, accumulation=2, total_steps=10)
    store = Store(folder)
    if start:
        saved = checkpoint.load(store, checkpoint.step_key("checkpoints", start), {"toy": engine.shapes})
        assert saved.step == start
        engine.load_state(saved.steps("toy"), saved.tensors("toy"))

    def save(step: int) -> None:
        states = {"toy": engine.state()}
        if dist.get_rank() == 0:
            checkpoint.save(store, checkpoint.step_key("checkpoints", step), states, {"step": step})
        dist.barrier()

    rows: list[dict[str, float]] = []
    lane = Lane(seed=3, save_every=save_every, save=save, report=rows.append, done=start)
    assert train({"toy": engine}, batches(start, stop, accumulation=2), lane) == stop
    return rows, engine.state()


def metrics(rows: list[dict[str, float]]) -> list[tuple[float, ...]]:
    return [tuple(row[name] for name in ("step", "loss", "error", "grad_norm", "learning_rate")) for row in rows]


def assert_same(left: State, right: State) -> None:
    """Bit for bit."""
    assert left.steps == right.steps
    assert left.tensors.keys() == right.tensors.keys()
    for name, kinds in left.tensors.items():
        assert kinds.keys() == right.tensors[name].keys()
        for kind, value in kinds.items():
            assert torch.equal(value.view(torch.int32), right.tensors[name][kind].view(torch.int32)), (name, kind)


def assert_close(left: State, right: State) -> None:
    for name, kinds in left.tensors.items():
        for kind, value in kinds.items():
            torch.testing.assert_close(value, right.tensors[name][kind], rtol=1e-5, atol=1e-6, msg=f"{name} {kind}")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bit_for_bit(solo: Group, duo: Group, tmp_path: Path, stage: int, world: int) -> None:
    group = solo if world == 1 else duo
    straight, straight_state = group.run(run, str(tmp_path), stage, 0, 10, {"ema": 0.8}, 5)[0]
    assert checkpoint.complete(Store(tmp_path), "checkpoints") == ["checkpoints/00000005", "checkpoints/00000010"]
    resumed, resumed_state = group.run(run, str(tmp_path), stage, 5, 10, {"ema": 0.8})[0]
    assert metrics(resumed) == metrics(straight)[5:]
    assert [row["step"] for row in resumed] == [6, 7, 8, 9, 10]
    assert_same(resumed_state, straight_state)
    assert {tuple(kinds) for kinds in straight_state.tensors.values()} == {("weight", "exp_avg", "exp_avg_sq", "ema")}
    assert straight_state.steps == 10
    unsaved, unsaved_state = group.run(run, str(tmp_path / "other"), stage, 0, 10, {"ema": 0.8})[0]
    assert metrics(unsaved) == metrics(straight)  # saving at step 5 left nothing different
    assert_same(unsaved_state, straight_state)


@pytest.mark.parametrize(("source", "target"), [((2, 1), (1, 0)), ((2, 3), (1, 3)), ((1, 0), (2, 3)), ((1, 2), (2, 2))])
def test_resume_at_another_stage_and_world_size(
    solo: Group, duo: Group, tmp_path: Path, source: tuple[int, int], target: tuple[int, int]
) -> None:
    groups = {1: solo, 2: duo}
    settings = {"ema": 0.8}
    # Dropout draws by rank, so here it has to be off for the two world sizes to agree.
    straight, straight_state = groups[source[0]].run(run_dry, str(tmp_path), source[1], 0, 10, settings, 5)[0]
    resumed, resumed_state = groups[target[0]].run(run_dry, str(tmp_path), target[1], 5, 10, settings)[0]
    assert [row["loss"] for row in resumed] == pytest.approx([row["loss"] for row in straight[5:]], rel=1e-5)
    assert_close(resumed_state, straight_state)


def run_dry(*arguments: Any) -> Outcome:
    """`run` without dropout."""
    forward = torch.nn.Dropout.forward
    torch.nn.Dropout.forward = lambda self, values: values  # type: ignore[method-assign]
    try:
        return run(*arguments)
    finally:
        torch.nn.Dropout.forward = forward  # type: ignore[method-assign]


def round_trip(state: State, stage: int) -> State:
    engine = make_engine(Toy(), make_train(ema=0.8), stage)
    engine.load_state(state.steps, state.tensors.items())
    assert engine.steps == state.steps
    return engine.state()


@pytest.mark.parametrize("stage", STAGES)
def test_export_of_an_import_is_the_same(duo: Group, stage: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {name: parameter.shape for name, parameter in Toy().trained().items()}
    kinds = ("weight", "exp_avg", "exp_avg_sq", "ema")
    tensors = {name: {k: torch.randn(shape, generator=generator) for k in kinds} for name, shape in shapes.items()}
    tensors["scale"]["exp_avg"][:2] = -0.0
    whole, rest = duo.run(round_trip, State(7, tensors), stage)
    assert list(whole.tensors) == NAMES
    assert_same(whole, State(7, tensors))
    assert rest == State(7, {})  # only rank 0 holds the tensors


def moving_average(stage: int, decay: float) -> tuple[Any, Any, Any]:
    """The engine's EMA, the closed form of the weights it went through, and its last weights."""
    engine = make_engine(Toy(), make_train(ema=decay), stage)
    expected = engine.weights()
    for step, (batch,) in batches(0, 8):
        engine.backward(engine(batch).total)
        engine.step()
        weight = 1 - ema_decay(decay, step + 1)
        for name, value in engine.weights().items():
            expected[name] = expected[name] + weight * (value - expected[name])
    return engine.weights(ema=True), expected, engine.weights()


@pytest.mark.parametrize("stage", STAGES)
def test_ema_is_the_closed_form(duo: Group, stage: int) -> None:
    average, expected, last = duo.run(moving_average, stage, 0.4)[0]
    assert list(average) == NAMES
    for name, value in average.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
        assert (value - last[name]).abs().max() > 1e-4


def learn_slowly(stage: int | None, frozen: torch.dtype, steps: int) -> dict[str, torch.Tensor]:
    """How far a constant rate of 1e-5 moves each trained weight; stage None is a plain torch loop."""
    player = Toy(frozen)
    start = {name: value.detach().clone() for name, value in player.trained().items()}
    settings = make_train(learning_rate=1e-5, schedule={}, max_grad_norm=None, optimizer={"weight_decay": 0.0})
    if stage is None:
        optimizer = torch.optim.AdamW(player.trained().values(), 1e-5, weight_decay=0.0)
        for _, (batch,) in batches(0, steps):
            optimizer.zero_grad()
            player(batch).total.backward()
            optimizer.step()
        return {name: value.detach() - start[name] for name, value in player.trained().items()}
    engine = make_engine(player, settings, stage)
    for _, (batch,) in batches(0, steps):
        engine.backward(engine(batch).total)
        engine.step()
    return {name: value - start[name] for name, value in engine.weights().items()}


@pytest.mark.parametrize("stage", STAGES)
def test_masters_are_fp32_over_a_bf16_base(solo: Group, duo: Group, stage: int) -> None:
    expected = solo.run(learn_slowly, None, torch.float32, 200)[0]
    moved = duo.run(learn_slowly, stage, torch.bfloat16, 200)[0]
    distance = torch.cat([(moved[name] - expected[name]).flatten() for name in NAMES]).norm()
    length = torch.cat([expected[name].flatten() for name in NAMES]).norm()
    assert length > 1e-3
    assert (distance / length).item() < 0.02  # 0.003 to 0.008: the arithmetic of the forward pass is bf16
    # In bf16 a weight near 0.3 can't move by 1e-5 at all.
    moving = torch.cat([(moved[name].abs() > 0).flatten() for name in NAMES]).float().mean()
    assert moving == 1.0


def eight_bit(stage: int, resume: bool) -> Outcome:
    """A player with enough elements for 8-bit moments, for six steps; resumed from its own state in the middle."""
    settings = make_train(optimizer={"type": "adamw_8bit"})

    def build() -> Engine:
        torch.manual_seed(0)
        player = Toy()
        player.head = torch.nn.Linear(6, 1501)
        return make_engine(player, settings, stage)

    engine, rows = build(), []
    for step, (batch,) in batches(0, 6):
        if resume and step == 3:
            box = [engine.state()]
            dist.broadcast_object_list(box, src=0)
            engine = build()
            engine.load_state(box[0].steps, box[0].tensors.items())
        batch.tensors["target"] = batch.tensors["target"].mean(1, keepdim=True)
        loss = engine(batch).total
        engine.backward(loss)
        engine.step()
        rows.append({"loss": loss.item()})
    return rows, engine.state()


def test_eight_bits_need_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as refused:
        make_optimizer(list(Toy().parameters()), make_train(optimizer={"type": "adamw_8bit"}))
    assert str(refused.value) == (
        "train.optimizer.type: 'adamw_8bit' needs bitsandbytes, which is not installed: "
        "pip install bitsandbytes, or use adamw"
    )


@pytest.mark.parametrize("stage", STAGES)
def test_eight_bit_moments_resume_closely(duo: Group, stage: int) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional")
    straight, straight_state = duo.run(eight_bit, stage, False)[0]
    resumed, resumed_state = duo.run(eight_bit, stage, True)[0]
    assert resumed[:3] == straight[:3]
    assert [row["loss"] for row in resumed] == pytest.approx([row["loss"] for row in straight], rel=1e-4)
    for name, kinds in straight_state.tensors.items():
        drift = (resumed_state.tensors[name]["weight"] - kinds["weight"]).abs().max()
        assert drift < 1e-3  # a step is 1e-2, and without moments the first one would be that far off
    assert straight_state.tensors["head.weight"]["exp_avg"].unique().numel() < 9006 / 2  # codes, not 9006 floats
