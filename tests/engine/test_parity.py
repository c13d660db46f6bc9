"""The engine against a plain torch loop: same losses, norms and weights at every stage and world size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from gtl.types import Batch, Losses
from tests.engine.group import Group
from tests.engine.toy import Toy, batches, collate, descend, global_batch, make_engine, make_train, plain_series

STEPS = 20
TOLERANCE = 1e-5


def run(stage: int, accumulation: int, steps: int = STEPS, **train: Any) -> tuple[list[float], list[float], Any]:
    """Losses, gradient norms and final weights of the engine."""
    player = Toy()
    engine = make_engine(player, make_train(**train), stage, accumulation, total_steps=steps)
    losses, norms = zip(*descend(engine, (each for _, each in batches(0, steps, accumulation))), strict=True)
    return list(losses), list(norms), engine.weights()


def plain(steps: int, train: dict[str, Any]) -> tuple[list[float], list[float], dict[str, Tensor]]:
    return plain_series(make_train(**train), steps)


@pytest.fixture(scope="module")
def reference(solo: Group) -> tuple[list[float], list[float], dict[str, Tensor]]:
    return solo.run(plain, STEPS, {})[0]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("world", "stage"), [(1, 0), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_series_equals_a_plain_torch_loop(
    solo: Group, duo: Group, reference: Any, world: int, stage: int, accumulation: int
) -> None:
    losses, norms, weights = (solo if world == 1 else duo).run(run, stage, accumulation)[0]
    assert losses == pytest.approx(reference[0], rel=TOLERANCE)
    assert norms == pytest.approx(reference[1], rel=TOLERANCE)
    assert max(norms) > 1 > 0.5 > 0.2 > min(norms)  # the limit of 0.5 bites in some steps and not in others
    assert weights.keys() == reference[2].keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, reference[2][name], rtol=TOLERANCE, atol=1e-6)
    start = Toy().trained()
    assert all((value - start[name].detach()).abs().mean() > 1e-3 for name, value in weights.items())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_without_a_limit_nothing_is_clipped(solo: Group, duo: Group, stage: int) -> None:
    losses, norms, _ = duo.run(run_unclipped, stage)[0]
    expected, expected_norms, _ = solo.run(plain, 6, {"max_grad_norm": None})[0]
    assert losses == pytest.approx(expected, rel=TOLERANCE)
    assert norms == pytest.approx(expected_norms, rel=TOLERANCE)
    assert max(norms) > 1


def run_unclipped(stage: int) -> Any:
    return run(stage, 1, 6, max_grad_norm=None)


def clipped_update(stage: int, limit: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """First moments after one step, and 0.1 times the gradient that torch clips by itself."""
    player, whole = Toy(), Toy()
    engine = make_engine(player, make_train(max_grad_norm=limit), stage)
    for _, micro_batches in batches(0, 1):
        for batch in micro_batches:
            engine.backward(engine(batch).total)
    engine.step()
    whole(collate(global_batch(0))).total.backward()
    clip_grad_norm_(whole.trained().values(), limit)
    expected = {name: 0.1 * parameter.grad for name, parameter in whole.trained().items()}
    return {name: kinds["exp_avg"] for name, kinds in engine.state().tensors.items()}, expected


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_clipped_gradient_is_torchs(duo: Group, stage: int) -> None:
    moments, expected = duo.run(clipped_update, stage, 0.05)[0]
    norm = torch.stack([value.norm() for value in moments.values()]).norm()
    assert norm.item() == pytest.approx(0.1 * 0.05, rel=1e-4)
    assert moments.keys() == expected.keys()
    for name, value in moments.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-8)


class Sitter(Toy):
    """Plays every second time it is called."""

    calls = 0

    def forward(self, batch: Batch) -> Losses | None:  # type: ignore[override]
        """None on odd calls."""
        self.calls += 1
        return super().forward(batch) if self.calls % 2 else None


def sit_out(stage: int) -> list[float]:
    engine = make_engine(Sitter(), make_train(), stage)
    losses = []
    for _, (batch,) in batches(0, 4):
        if (answer := engine(batch)) is not None:
            engine.backward(answer.total)
            engine.step()
            total = answer.total.detach()
            dist.all_reduce(total)
            losses.append(total.item())
    assert engine.steps == 2
    return losses


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_player_may_sit_a_step_out(duo: Group, reference: Any, stage: int) -> None:
    losses = duo.run(sit_out, stage)[0]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(reference[0][0], rel=TOLERANCE)


class Walked(Toy):
    """Counts searches of its modules for parameters."""

    walks = 0

    def named_parameters(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """What `parameters` goes through too."""
        self.walks += 1
        return super().named_parameters(*arguments, **options)


def count_walks() -> int:
    player = Walked()
    engine = make_engine(player, make_train(), stage=0)
    before = player.walks
    for _, (batch,) in batches(0, 3):
        engine.backward(engine(batch).total)
        engine.step()
    assert all(parameter.grad is None for parameter in player.trained().values())
    return player.walks - 1 - before  # one by `trained`


def test_steps_without_sharding_do_not_search_the_model(duo: Group) -> None:
    assert duo.run(count_walks) == [0, 0]


class Partial(Toy):
    """Leaves a parameter out on rank 1."""

    def forward(self, batch: Batch) -> Losses:
        """The scale counts on rank 0 only."""
        total = super().forward(batch).total
        return Losses(total if dist.get_rank() == 0 else total.detach() + self.conv.weight.sum(), {})


def step_partially() -> tuple[float, Tensor]:
    player = Partial()
    engine = make_engine(player, make_train(), stage=0)
    for _, (batch,) in batches(0, 3):
        engine.backward(engine(batch).total)
        engine.step()
    return engine.grad_norm, player.scale.detach()


def test_a_gradient_of_one_rank_only_reaches_all(duo: Group) -> None:
    (norm, scale), (other_norm, other_scale) = duo.run(step_partially)
    assert norm == other_norm
    torch.testing.assert_close(scale, other_scale, rtol=0, atol=0)
    assert not torch.equal(scale, Toy().scale.detach())
