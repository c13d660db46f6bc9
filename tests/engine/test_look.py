"""Looking at a model while it is trained: averaged weights, validation, early stopping, in real process groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from gtl.train.best import Best
from gtl.train.loop import Lane, train
from tests.engine.group import Group
from tests.engine.toy import Toy, batches, collate, global_batch, make_engine, make_train


def look_inside(stage: int, ema: float | None) -> dict[str, Any]:
    """What the forward pass computes outside, within `evaluating` and outside again, beside plain torch."""
    engine = make_engine(Toy(), make_train(ema=ema), stage)
    lane = Lane(seed=1, save_every=100, save=lambda step: None, report=lambda row: None)
    train({"toy": engine}, batches(0, 4), lane)
    batch = collate(global_batch(9))
    with torch.no_grad():
        before = engine(batch).total
    with engine.evaluating():
        within, training = engine(batch).total, [module.training for module in engine._engine.module.modules()]
        assert not torch.is_grad_enabled()
    state, averaged = engine.weights(), engine.weights(ema=ema is not None)
    with torch.no_grad():
        after = engine(batch).total
    train({"toy": engine}, batches(4, 6), lane)
    plain = Toy()
    if averaged:
        plain.load_state_dict({**plain.state_dict(), **averaged})
    return {
        "before": before.item(), "within": within.item(), "after": after.item(), "modes": set(training),
        "expected": plain(batch).total.item(), "weights": state, "final": engine.weights(),
    }  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_evaluation_sees_the_average_and_leaves_no_trace(duo: Group, stage: int) -> None:
    first, second = duo.run(look_inside, stage, 0.9)
    plain = duo.run(look_inside, stage, None)[0]
    for found in (first, second):
        assert found["within"] == pytest.approx(first["expected"], rel=1e-6)
        assert found["before"] == found["after"] != pytest.approx(found["within"], rel=1e-4)
        assert found["modes"] == {False}
    assert plain["within"] == plain["before"] == first["before"]
    for name, value in first["final"].items():
        assert torch.equal(value, plain["final"][name])


@dataclass
class Staged:
    """Answers with given losses, one a step."""

    losses: list[float]
    best: Best
    asked: list[int] = field(default_factory=list)

    def __call__(self, done: int) -> Mapping[str, float]:
        self.asked.append(done)
        if done == 0:
            return {"val_loss": 9.0}
        self.best.take(done, self.losses[done - 1])
        return {"val_loss": self.losses[done - 1]}

    @property
    def enough(self) -> bool:
        return self.best.enough


def stop_early(losses: list[float], patience: int, done: int = 0) -> dict[str, Any]:
    rows: list[dict[str, float]] = []
    saved: list[int] = []
    look = Staged(losses, Best("val_loss", patience=patience))
    look.best.replay(({"step": i + 1, "val_loss": loss} for i, loss in enumerate(losses)), done, range(done + 1))
    lane = Lane(1, 100, saved.append, rows.append, look, done=done)
    steps = train({"toy": make_engine(Toy(), make_train(), 0)}, batches(done, 10), lane)
    return {"steps": steps, "saved": saved, "rows": [(row["step"], row.get("val_loss")) for row in rows],
            "best": look.best.step, "asked": look.asked}  # fmt: skip


def test_a_run_ends_when_patience_is_used_up_and_saves(duo: Group) -> None:
    losses = [5.0, 4.0, 4.5, 3.0, 3.5, 3.0, 2.0, 1.0, 1.0, 1.0]
    for found in duo.run(stop_early, losses, 2):
        assert (found["steps"], found["saved"], found["best"]) == (6, [6], 4)
        assert found["asked"] == [0, 1, 2, 3, 4, 5, 6]
    assert duo.run(stop_early, losses, 2)[0]["rows"] == [(0, 9.0), *((i + 1, losses[i]) for i in range(6))]
    assert duo.run(stop_early, losses, 3)[0]["steps"] == 10


def test_a_resumed_run_counts_on(duo: Group) -> None:
    losses = [5.0, 4.0, 4.5, 3.0, 3.5, 3.0, 2.0, 1.0, 1.0, 1.0]
    resumed = duo.run(stop_early, losses, 2, 5)[0]
    assert (resumed["steps"], resumed["asked"]) == (6, [6])
    ended = duo.run(stop_early, losses, 2, 6)[0]
    assert (ended["steps"], ended["asked"], ended["saved"]) == (6, [], [])


def test_a_better_value_has_to_be_better_by_the_minimum() -> None:
    best = Best("val_loss", min_delta=0.1, patience=2)
    assert [best.take(step, value) for step, value in ((0, 0.1), (1, 1.0), (2, 0.95), (3, 0.8))] == [
        False, True, False, True,
    ]  # fmt: skip
    assert (best.value, best.step, best.enough) == (0.8, 3, False)
    assert not best.take(4, float("nan"))
    assert not best.take(5, 0.75)
    assert best.enough


def test_a_score_that_is_to_be_high_is_best_where_it_is_highest() -> None:
    best = Best("prompt_accuracy")
    assert [best.take(step, value) for step, value in ((0, 1.0), (1, 0.0), (2, 0.5), (3, 0.25), (4, 0.5))] == [
        False, True, True, False, False,
    ]  # fmt: skip
    assert (best.value, best.step, best.waited, best.enough) == (0.5, 2, 2, False)
    assert best.verdict == {"scores": {"prompt_accuracy": 0.5}, "best_step": 2}
