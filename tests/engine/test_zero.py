"""ZeRO with its options, offloading and secondary shares, learns the same, and goes on in the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gtl.train.engine import Engine
from gtl.types import Batch, Losses
from tests.engine.group import Group
from tests.engine.test_memory import WIDTHS, Tower
from tests.engine.toy import Toy, batches, descend, make_engine, make_train

ACCUMULATION = 2


def go_on(engine: Engine, start: int, stop: int) -> list[tuple[float, float]]:
    """Losses and gradient norms of some steps."""
    return descend(engine, (each for _, each in batches(start, stop, ACCUMULATION)))


def run(stage: int, zero: dict[str, Any]) -> tuple[Any, Any, float, dict[str, Tensor]]:
    """Six steps; the last three again by another engine; a loss under the averaged weights; these weights."""
    train = make_train(zero=zero, ema=0.9)

    def fresh() -> Engine:
        return make_engine(Toy(), train, stage, ACCUMULATION)

    engine = fresh()
    first = go_on(engine, 0, 3)
    states = [engine.state()]
    dist.broadcast_object_list(states)
    last = go_on(engine, 3, 6)
    ((_, (batch, _)),) = batches(6, 7, ACCUMULATION)
    with engine.evaluating():
        judged = engine(batch).total.item()
    again = fresh()
    again.load_state(states[0].steps, states[0].tensors.items())
    assert go_on(again, 3, 6) == last
    weights, repeated = engine.weights(ema=True), again.weights(ema=True)
    assert all(torch.equal(value, repeated[name]) for name, value in weights.items())
    return first, last, judged, weights


class Wide(Tower):
    """Its share of the mean."""

    def forward(self, batch: Batch) -> Losses:
        """Something to descend."""
        return Losses(super().forward(batch).total / dist.get_world_size(), {})


def run_wide(zero: dict[str, Any]) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Four steps of layers that are too large to stay gathered; the last two by an engine that goes on."""

    def fresh() -> Engine:
        player = Wide()
        generator = torch.Generator().manual_seed(0)
        for parameter in player.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        trained = {name: p for name, p in player.named_parameters() if p.requires_grad}
        train = make_train(zero=zero, ema=0.9)
        return Engine(
            player, trained, train, stage=3, micro_batch=2, accumulation=1, device="cpu", total_steps=4
        )  # fmt: skip

    def batch(step: int) -> Batch:
        x = torch.randn(2, WIDTHS[0], generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        return Batch({"x": x}, torch.ones(2))

    def steps(engine: Engine, start: int, stop: int) -> list[tuple[float, float]]:
        return descend(engine, ([batch(step)] for step in range(start, stop)))

    engine = fresh()
    first = steps(engine, 0, 2)
    states = [engine.state()]
    dist.broadcast_object_list(states)
    last = steps(engine, 2, 4)
    again = fresh()
    steps(again, 0, 1)  # has gathered other weights, and kept them
    again.load_state(states[0].steps, states[0].tensors.items())
    assert steps(again, 2, 4) == last
    return first + last, again.weights(ema=True)


@pytest.mark.parametrize("zero", [{"offload": "cpu"}, {"hpz": 2}, {"hpz": 2, "offload": "cpu"}])
def test_weights_that_are_gathered_anew_for_every_pass(duo: Group, zero: dict[str, Any]) -> None:
    expected, found = (duo.run(run_wide, settings)[0] for settings in ({}, zero))
    for one, other in zip(found[0], expected[0], strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    assert len(set(expected[0])) == 4
    for name, value in found[1].items():
        torch.testing.assert_close(value, expected[1][name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("stage", "zero"),
    [(1, {"offload": "cpu"}), (2, {"offload": "cpu"}), (3, {"offload": "cpu"}), (3, {"hpz": 2}),
     (3, {"hpz": 2, "offload": "cpu"})],
)  # fmt: skip
def test_where_things_are_kept_changes_no_number(duo: Group, stage: int, zero: dict[str, Any]) -> None:
    expected, found = (duo.run(run, stage, settings)[0] for settings in ({}, zero))
    for some, others in zip(found[:2], expected[:2], strict=True):
        for one, other in zip(some, others, strict=True):
            assert one == pytest.approx(other, rel=1e-6)
    assert found[2] == pytest.approx(expected[2], rel=1e-6)
    assert len(found[3]) == 5
    for name, value in found[3].items():
        torch.testing.assert_close(value, expected[3][name], rtol=1e-6, atol=1e-7)
