"""The loop and its lane in real process groups: agreement, saving, stopping, seeds, rows."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gtl.train.loop import DivergedError, Lane, Wish, stop_on_signals, train
from gtl.types import Batch, Losses
from tests.engine.group import Group
from tests.engine.toy import SAMPLES, Toy, batches, make_engine, make_train

METRICS = {
    "step", "loss", "error", "grad_norm", "learning_rate", "images_per_second", "step_seconds", "data_wait",
    "peak_memory_bytes", "tflops",
}  # fmt: skip
Log = dict[str, Any]


def run(
    stop: int, stage: int = 0, save_every: int = 100, done: int = 0,
    feed: Callable[[Lane], Iterator[Any]] | None = None, report: Callable[[Any], Wish | None] | None = None,
) -> Log:  # fmt: skip
    """What happened: rows, steps saved, how it ended."""
    engine = make_engine(Toy(), make_train(), stage)
    log: Log = {"rows": [], "saved": [], "error": None}

    def note(row: dict[str, float]) -> Wish | None:
        log["rows"].append(row)
        return report(row) if report else None

    lane = Lane(seed=1, save_every=save_every, save=log["saved"].append, report=note, done=done)
    try:
        log["done"] = train({"toy": engine}, feed(lane) if feed else batches(done, stop), lane)
    except DivergedError as error:
        log["error"] = str(error)
        log["done"] = lane.done
    log["weights_finite"] = all(value.isfinite().all() for value in engine.weights().values())
    return log


def only_rank(rank: int, step: int, act: Callable[[Lane], None]) -> Callable[[Lane], Iterator[Any]]:
    """Batches that let one rank act in the middle of fetching those of a step."""

    def feed(lane: Lane) -> Iterator[Any]:
        for number, micro_batches in batches(0, 20):
            if number == step and dist.get_rank() == rank:
                act(lane)
            yield number, micro_batches

    return feed


def test_a_row_a_step_on_rank_0_and_saves_when_due(duo: Group) -> None:
    first, second = duo.run(run, 5, 2, 2)
    assert [row["step"] for row in first["rows"]] == [1, 2, 3, 4, 5]
    assert second["rows"] == []
    assert first["saved"] == second["saved"] == [2, 4, 5]
    assert first["done"] == second["done"] == 5
    for row in first["rows"]:
        assert row.keys() == METRICS
        assert row["error"] == row["loss"]  # of both ranks together, like the total
        assert row["images_per_second"] * row["step_seconds"] == pytest.approx(SAMPLES)  # the filler is no image
        assert 0 <= row["data_wait"] < 1
        assert row["peak_memory_bytes"] > 100e6
    rates = [row["learning_rate"] for row in first["rows"]]
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])


def test_a_resumed_run_with_nothing_left_saves_nothing(solo: Group) -> None:
    log = solo.run(run, 5, 0, 2, 5)[0]
    assert (log["rows"], log["saved"], log["done"]) == ([], [], 5)


def poisoned(rank: int, value: float) -> Log:
    def feed(lane: Lane) -> Iterator[Any]:
        for number, micro_batches in batches(0, 10):
            if number == 3 and dist.get_rank() == rank:
                micro_batches[0].tensors["target"][:] = value
            yield number, micro_batches

    return run(10, stage=2, save_every=2, feed=feed)


@pytest.mark.parametrize(("rank", "value"), [(0, float("nan")), (1, float("nan")), (0, float("inf"))])
def test_a_bad_loss_on_one_rank_stops_all_at_the_same_step(duo: Group, rank: int, value: float) -> None:
    first, second = duo.run(poisoned, rank, value)
    assert first["error"] == second["error"] == (
        f"train.learning_rate: loss is {value} at step 4; the checkpoint of step 2 stands; "
        "try a lower rate, a longer train.schedule.warmup or model.dtype=fp32"
    )
    assert first["saved"] == second["saved"] == [2]
    assert first["done"] == second["done"] == 3
    assert first["weights_finite"]


class Exploding(Toy):
    """Finite losses with an infinite gradient from the third step on."""

    calls = 0

    def forward(self, batch: Batch) -> Losses:
        """A square root at zero has an infinite slope."""
        losses = super().forward(batch)
        self.calls += 1
        zero = (self.scale - self.scale.detach()).square().sum()
        return Losses(losses.total + (zero.sqrt() if self.calls > 2 else 0.0), losses.parts)


def explode(stage: int) -> tuple[str, list[int], bool]:
    engine = make_engine(Exploding(), make_train(), stage)
    saved: list[int] = []
    lane = Lane(seed=1, save_every=1, save=saved.append, report=lambda row: None)
    with pytest.raises(DivergedError) as error:
        train({"toy": engine}, batches(0, 10), lane)
    finite = all(value.isfinite().all() for value in engine.weights().values())
    return str(error.value), saved, finite


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bad_gradient_is_neither_applied_nor_saved(duo: Group, stage: int) -> None:
    answers = duo.run(explode, stage)
    for message, saved, finite in answers:
        assert message.startswith("train.learning_rate: grad_norm is ")
        assert "at step 3; the checkpoint of step 2 stands" in message
        assert saved == [1, 2]
        assert finite


def stop_one(rank: int) -> Log:
    return run(20, feed=only_rank(rank, 4, Lane.request_stop))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_asked_of_one_rank_stops_both_with_a_save(duo: Group, rank: int) -> None:
    first, second = duo.run(stop_one, rank)
    assert first["done"] == second["done"] == 5
    assert first["saved"] == second["saved"] == [5]
    assert len(first["rows"]) == 5


def save_one() -> Log:
    return run(20, save_every=8, feed=only_rank(1, 4, Lane.request_save))


def test_a_save_asked_of_one_rank_is_made_by_both(duo: Group) -> None:
    first, second = duo.run(save_one)
    assert first["saved"] == second["saved"] == [5, 13, 20], "the next is due 8 steps after any other"


def stop_by_report() -> Log:
    return run(20, report=lambda row: "stop" if row["step"] == 4 else None)


def save_by_report() -> Log:
    return run(8, report=lambda row: "save" if row["step"] == 3 else None)


def test_a_stop_by_whoever_reads_the_rows_comes_a_step_later(duo: Group) -> None:
    for log in duo.run(stop_by_report):
        assert (log["done"], log["saved"]) == (5, [5])


def test_a_save_by_whoever_reads_the_rows_comes_a_step_later_and_the_run_goes_on(duo: Group) -> None:
    for log in duo.run(save_by_report):
        assert (log["done"], log["saved"]) == (8, [4, 8])


def signalled(number: int) -> tuple[Log, bool]:
    """A real signal to rank 1, in its main thread."""
    seen: list[int] = []
    before = signal.signal(number, lambda *_: seen.append(number))

    def feed(lane: Lane) -> Iterator[Any]:
        with stop_on_signals(lane):
            for step, micro_batches in batches(0, 20):
                if step == 2 and dist.get_rank() == 1:
                    os.kill(os.getpid(), number)
                    assert not seen
                    os.kill(os.getpid(), number)
                    assert seen == [number]  # the second one is not ours
                yield step, micro_batches

    log = run(20, feed=feed)
    os.kill(os.getpid(), number)
    restored = seen[-1:] == [number] and len(seen) == (2 if dist.get_rank() == 1 else 1)
    signal.signal(number, before)
    return log, restored


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_all(duo: Group, number: int) -> None:
    for log, restored in duo.run(signalled, number):
        assert (log["done"], log["saved"]) == (3, [3])
        assert restored


def draws() -> list[float]:
    """The first draw of each step from torch's global generator."""
    lane = Lane(seed=5, save_every=1, save=lambda step: None, report=lambda row: None)
    return [torch.rand(()).item() for _ in lane.watch((step, []) for step in (0, 1, 2, 1))]


def test_the_global_generator_depends_on_seed_step_and_rank(duo: Group) -> None:
    first, second = duo.run(draws)
    assert first[1] == first[3]
    assert len({*first, *second}) == 6


class Drawer(Toy):
    """A second player, with other initial weights."""

    def forward(self, batch: Batch) -> Losses:
        """Twice the loss; part of a name of its own."""
        losses = super().forward(batch)
        return Losses(2 * losses.total, {"twice": 2 * losses.total.detach()})


def two_players() -> tuple[list[dict[str, float]], int]:
    players = {name: make_engine(kind(), make_train(), 1) for name, kind in (("first", Toy), ("second", Drawer))}
    rows: list[dict[str, float]] = []
    lane = Lane(seed=1, save_every=9, save=lambda step: None, report=rows.append)
    return rows, train(players, batches(0, 2), lane)


def test_several_players_take_turns_and_report_under_their_names(duo: Group) -> None:
    rows, done = duo.run(two_players)[0]
    assert done == 2
    assert rows[0].keys() == METRICS - {"loss", "error", "grad_norm", "learning_rate"} | {
        "first_loss", "first_error", "first_grad_norm", "first_learning_rate",
        "second_loss", "second_twice", "second_grad_norm", "second_learning_rate",
    }  # fmt: skip
    assert rows[0]["second_loss"] == pytest.approx(2 * rows[0]["first_loss"])
    assert rows[0]["images_per_second"] * rows[0]["step_seconds"] == pytest.approx(SAMPLES)
