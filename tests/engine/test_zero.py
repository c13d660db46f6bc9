"""ZeRO with its options, offloading and secondary shares, learns the same, and goes on in the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gtl.train.engine import Engine
from tests.engine.group import Group
from tests.engine.toy import Toy, batches, make_engine, make_train

ACCUMULATION = 2


def go_on(engine: Engine, start: int, stop: int) -> list[tuple[float, float]]:
    """Losses and gradient norms of some steps."""
    found = []
    for _, micro_batches in batches(start, stop, ACCUMULATION):
        total = torch.zeros(())
        for batch in micro_batches:
            share = engine(batch).total
            engine.backward(share)
            total += share.detach()
        engine.step()
        dist.all_reduce(total)
        found.append((total.item(), engine.grad_norm))
    return found


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
    again.load_state(states[0])
    assert go_on(again, 3, 6) == last
    weights, repeated = engine.weights(ema=True), again.weights(ema=True)
    assert all(torch.equal(value, repeated[name]) for name, value in weights.items())
    return first, last, judged, weights


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
