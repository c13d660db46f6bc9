"""`gtl bench stopping`: replays whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gtl.bench.stopping import bench_stopping, distribution, summary, table
from gtl.config import parse_study
from gtl.config.load import dump_study
from gtl.search.record import Record, TrialRecord
from gtl.search.replay import Outcome, replay
from gtl.search.schedule import make_scheduler
from gtl.storage import Store
from gtl.types import UserError

STEPS = (30, 90, 300)


def make_study(**asked: Any) -> Any:
    return parse_study({
        "recipe": {"model": {"source": "builtin:tiny"}, "data": {"source": "s3://photos"},
                   "train": {"steps": 300}, "evaluate": {"every": 30}},
        "space": {"train.learning_rate": {"choice": [0.1, 0.2, 0.3, 0.4]}}, "metric": "prompt_accuracy",
        "scheduler": {"type": "fifo"}, **asked,
    })  # fmt: skip


def flat(*scores: float) -> dict[str, list[tuple[int, float]]]:
    """Trials a, b, ... whose metric never changes."""
    return {name: [(step, score) for step in STEPS] for name, score in zip("abcdefgh", scores, strict=False)}


def run(curves: Any, order: str, concurrency: int = 1, **paces: float) -> Outcome:
    scheduler = make_scheduler(make_study(scheduler={"type": "asha"}))
    return replay(scheduler, curves, order, concurrency, ("step", "prompt_accuracy"), "max", paces)


def test_the_order_decides_what_is_spent() -> None:
    curves = flat(0.9, 0.8, 0.7)
    assert run(curves, "abc") == Outcome("a", 300 + 30 + 30)  # behind the best, all stop at the first rung
    assert run(curves, "cba") == Outcome("a", 3 * 300)  # each is the best so far
    assert run(curves, "bac") == Outcome("a", 300 + 300 + 30)


def test_who_is_late_is_lost_if_others_were_there_before() -> None:
    late = {**flat(0, 0.5, 0.4), "a": [(30, 0.1), (90, 0.9), (300, 1.0)]}
    assert run(late, "abc") == Outcome("a", 300 + 90 + 90)  # b and c pass 30, where a was, and not 90
    assert run(late, "bac") == Outcome("b", 300 + 30 + 90)  # c is above two thirds of the way from a to b


def test_of_trials_at_once_the_fast_ones_are_judged_first() -> None:
    curves = flat(0.5, 0.9, 0.6)
    assert run(curves, "bac") == run(curves, "bac", 3) == Outcome("b", 300 + 30 + 30)
    assert run(curves, "bac", 3, b=20.0) == Outcome("b", 3 * 300)  # a and c are through before b is at 30
    assert run(curves, "bac", 2, b=20.0, c=50.0) == Outcome("b", 300 + 300 + 30)  # c begins when a is through


def test_a_summary_is_arithmetic() -> None:
    curves = {**flat(0.9, 0.8, 0.5), "d": [(30, 0.2), (100, 0.4)]}
    outcomes = [Outcome("a", 500), Outcome("b", 250), Outcome("a", 250), Outcome("c", 1000)]
    found = summary(curves, "max", ["abcd", "bacd", "cabd", "dcba"], outcomes)
    assert (found["trials"], found["orders"], found["best"], found["found"]) == (4, 4, "a", 0.5)
    assert found["spread"] == pytest.approx(0.5)
    assert found["regret"] == pytest.approx({"mean": 0.125, "q10": 0.0, "q50": 0.0, "q90": 0.4, "max": 0.4})
    # a; b; c, which is longer than what was spent; d, c, b, a.
    assert found["whole_regret"] == pytest.approx({"mean": 0.125, "q10": 0.0, "q50": 0.0, "q90": 0.4, "max": 0.4})
    assert found["share"] == pytest.approx({"mean": 0.5, "q10": 0.25, "q50": 0.25, "q90": 1.0, "max": 1.0})


def test_a_lower_loss_is_a_better_one() -> None:
    found = summary(flat(0.9, 0.8, 0.5), "min", ["abc"], [Outcome("b", 300)])
    assert found["best"] == "c" and found["regret"]["mean"] == pytest.approx(0.3)


def test_a_quantile_is_one_of_the_values() -> None:
    assert distribution([4.0, 1.0, 3.0, 2.0]) == {"mean": 2.5, "q10": 1.0, "q50": 2.0, "q90": 4.0, "max": 4.0}


def write_study(folder: Path, states: list[str], study: Any) -> str:
    store = Store(folder / "rates" / "v1")
    store.write("study.yaml", dump_study(study).encode())
    record = Record(store, "rates", "v1", study)
    for (name, curve), state in zip(flat(0.9, 0.8, 0.7, 0.1).items(), states, strict=True):
        looks = [{"step": float(step), "prompt_accuracy": value} for step, value in curve]
        config = {"train.learning_rate": 0.1}
        record.trials[name] = TrialRecord(name, config, store.url(), state, None, 300, looks=looks, device_hours=0.3)
    record.save(0.0)
    return store.url()


def test_a_folder_becomes_a_table(tmp_path: Path) -> None:
    folder = write_study(tmp_path, ["finished"] * 3 + ["failed"], make_study())
    result = bench_stopping(folder, [], 200, 1, 0, tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert (result["trials"], result["orders"], result["found"]) == (3, 200, 1.0)
    assert result["regret"] == {"mean": 0.0, "q10": 0.0, "q50": 0.0, "q90": 0.0, "max": 0.0}
    # Orders of three by who is better than all before: 1, 2, 2, 2, 1, 3 whole ones of 300, the others of 30.
    assert result["share"]["mean"] == pytest.approx((2 * 360 + 3 * 630 + 900) / 6 / 900, abs=0.03)
    assert table(result).splitlines()[0] == "rates@v1: 200 orders of 3 whole trials, 1 at once, under asha"
    kept = bench_stopping(folder, ["scheduler.grace_period=270"], 5, 1, 0, None)
    assert kept["share"]["mean"] == 1.0  # nobody looked at that step, so nobody was stopped


@pytest.mark.parametrize(
    ("states", "overrides", "orders", "message"),
    [
        (["finished", "stopped", "finished", "failed"], [], 1, "{}: b is stopped: a replay needs whole trials; "),
        (["finished", "failed", "failed", "failed"], [], 1, "{}: 1 whole trials with prompt_accuracy: a replay needs "),
        (["finished"] * 4, [], 0, "--orders: 0: must be 1 or more"),
        (["finished"] * 4, ["scheduler.type=ashes"], 1, "scheduler.type: 'ashes': "),
    ],
)
def test_what_cannot_be_replayed_is_one_line(
    tmp_path: Path, states: list[str], overrides: list[str], orders: int, message: str
) -> None:
    folder = write_study(tmp_path, states, make_study())
    with pytest.raises(UserError) as caught:
        bench_stopping(folder, overrides, orders, 1, 0, None)
    assert str(caught.value).startswith(message.format(folder)) and "\n" not in str(caught.value)
