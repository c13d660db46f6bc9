"""Packs: runs that share a forward pass learn what each learns alone, come and go, and have the same checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gtl.train.checkpoint import complete, load
from gtl.train.job import CHECKPOINTS, RESULT, Job
from gtl.train.track import read_rows
from tests.engine.group import Group
from tests.engine.runs import make_job

RANK = 8
RUNS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"rank": 4, "initialization": "random_b"}, {"learning_rate": 1e-3}),
    (
        {"rank": 2, "alpha": 3.0, "freeze_depth": 0.5},
        {"learning_rate": 3e-4, "schedule": {"type": "cosine", "warmup": 5}},
    ),
    ({"rank": 8, "rslora": True}, {"learning_rate": 2e-3, "seed": 5}),
    (
        {"rank": 3, "initialization": "gaussian", "freeze_depth": 1},
        {"learning_rate": 2e-3, "schedule": {"type": "constant"}},
    ),
)


def jobs(folder: Path, version: str, steps: int, runs: int = len(RUNS), **train: Any) -> list[Job]:
    """The same runs under another version."""
    made = []
    for number, (tuner, changes) in enumerate(RUNS[:runs]):
        asked = {"steps": steps, "batch_size": 1, "checkpoints": {"every": 20}, **train, **changes}
        targets = {"type": "lora", "targets": "all-linear+conv", "train": ["unet"], **tuner}
        made.append(replace(make_job(folder, targets, **asked), name=f"run{number}", version=version))
    return made


def alone(job: Job, stop: int | None = None) -> None:
    """A run with the model to itself, perhaps stopped at a step."""
    from gtl.train.worker import run

    run(job, torch.device("cpu"), lambda row: "stop" if row["step"] == stop else None)


def packed(
    jobs: list[Job], late: int = 0, stop: dict[str, int] | None = None, places: int = len(RUNS)
) -> dict[str, str]:
    """Runs in a pack, the last of them after so many steps; why any of them failed."""
    from gtl.train.pack import Pack

    pack, failed = Pack(jobs[0], torch.device("cpu"), places, RANK), {}
    waiting, members, steps = list(jobs), {}, 0

    def join(job: Job) -> None:
        member = pack.join(job, lambda row: "stop" if row["step"] == (stop or {}).get(job.name) else None)
        members[id(member)] = job.name

    while waiting or pack.members:
        while waiting and len(pack.members) < places and (len(waiting) > 1 or not late or steps >= late):
            join(waiting.pop(0))
        for member in pack.step():
            if member.error is not None:
                failed[members[id(member)]] = str(member.error)
        steps += 1
    return failed


def losses(job: Job) -> list[float]:
    return [row["loss"] for row in read_rows(job.run) if "loss" in row]


def test_a_packed_run_learns_what_it_learns_alone(solo: Group, tmp_path: Path) -> None:
    """50 steps: losses to 1e-5; the last run comes when the others have made ten.

    At rates five times as high what a batch's size changes by rounding grows to 4e-5 by then.
    """
    mine, theirs = jobs(tmp_path, "alone", 50), jobs(tmp_path, "packed", 50)
    for job in mine:
        solo.run(alone, job)
    assert solo.run(packed, theirs, 10) == [{}]
    for one, other in zip(mine, theirs, strict=True):
        assert len(losses(one)) == 50
        assert losses(other) == pytest.approx(losses(one), rel=1e-5)
        rows = [{key for row in read_rows(job.run) for key in row} - {"tflops"} for job in (one, other)]
        assert rows[0] == rows[1]
        assert [key for key, _, _ in one.run.list("adapter")] == [key for key, _, _ in other.run.list("adapter")]
        assert other.run.exists(RESULT)
        keys = [complete(job.run, CHECKPOINTS) for job in (one, other)]
        assert keys[0] == keys[1]
        states = [load(job.run, keys[0][-1], saved_shapes(job)) for job in (one, other)]
        assert (
            states[0].manifest["players"]["denoiser"]["parameters"]
            == states[1].manifest["players"]["denoiser"]["parameters"]
        )
        a, b = (dict(state.tensors("denoiser")) for state in states)
        assert {name: kinds.keys() for name, kinds in a.items()} == {name: kinds.keys() for name, kinds in b.items()}


def saved_shapes(job: Job) -> dict[str, dict[str, tuple[int, ...]]]:
    from gtl.train.checkpoint import latest, read_manifest

    players = read_manifest(job.run, latest(job.run, CHECKPOINTS) or "")["players"]
    return {player: {n: tuple(s) for n, s in entry["parameters"].items()} for player, entry in players.items()}


@pytest.mark.parametrize("first", ["alone", "packed"])
def test_a_run_moves_from_a_pack_and_into_one(solo: Group, tmp_path: Path, first: str) -> None:
    """Stopped in the middle, and gone on with the other way: losses of a run that was never stopped, to 1e-5."""
    (straight,), (moved,) = jobs(tmp_path, "straight", 12, 1, ema=0.9), jobs(tmp_path, "moved", 12, 1, ema=0.9)
    solo.run(alone, straight)
    if first == "alone":
        solo.run(alone, moved, 5)
        assert solo.run(packed, [moved]) == [{}]
    else:
        assert solo.run(packed, [moved], 0, {"run0": 5}) == [{}]
        assert not moved.run.exists(RESULT)
        solo.run(alone, moved)
    assert losses(moved) == pytest.approx(losses(straight), rel=1e-5)
    assert moved.run.exists(RESULT)


def test_a_run_that_diverges_is_alone_in_it(solo: Group, tmp_path: Path) -> None:
    """The others' losses are what they are without it, and its place is free for the next."""
    good, again = jobs(tmp_path, "v1", 8, 2)
    bad = replace(good, name="bad", recipe={**good.recipe, "train": {**good.recipe["train"], "learning_rate": 1e30}})
    (failed,) = solo.run(packed, [good, bad, again], 0, None, 2)
    assert failed.keys() == {"bad"} and failed["bad"].startswith("train.learning_rate: ")
    for job in (good, again):
        twin = replace(job, version="twin")
        solo.run(alone, twin)
        assert losses(job) == pytest.approx(losses(twin), rel=1e-5)


def short_of_memory(jobs: list[Job]) -> tuple[dict[str, str], list[int]]:
    """`packed`, on a device that has memory for three images at once."""
    from gtl.objectives.denoise import Denoiser

    forward, sizes = Denoiser.forward, []

    def limited(self: Denoiser, batch: Any) -> Any:
        if len(batch.tensors["clean"]) > 3 and self.training:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(batch.tensors["clean"]))
        return forward(self, batch)

    Denoiser.forward = limited
    try:
        return packed(jobs), sizes
    finally:
        Denoiser.forward = forward


def test_a_pack_that_is_too_large_for_the_memory_goes_in_parts(solo: Group, tmp_path: Path) -> None:
    mine, theirs = jobs(tmp_path, "whole", 3, batch_size=2), jobs(tmp_path, "parts", 3, batch_size=2)
    assert solo.run(packed, mine) == [{}]
    ((failed, sizes),) = solo.run(short_of_memory, theirs)
    assert failed == {} and set(sizes) == {2}
    for one, other in zip(mine, theirs, strict=True):
        assert losses(other) == pytest.approx(losses(one), rel=1e-5)


def timed(job: Job) -> dict[int, float]:
    from gtl.train.pack import Pack

    return Pack(job, torch.device("cpu"), 4, RANK).seconds(job, (1, 2, 4))


def test_a_pack_knows_what_a_step_takes(solo: Group, tmp_path: Path) -> None:
    (taken,) = solo.run(timed, jobs(tmp_path, "timed", 3, 1)[0])
    assert taken.keys() == {1, 2, 4} and all(seconds > 0 and math.isfinite(seconds) for seconds in taken.values())
