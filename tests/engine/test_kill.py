"""A run whose workers are killed ends in the same bits as one that nobody disturbed."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from gtl.train.checkpoint import complete
from gtl.train.job import CHECKPOINTS, RESULT
from tests.engine.runs import Kill, go, learned, make_job, told

FULL = {"type": "full"}
LORA = {"type": "lora", "rank": 4}
KILLED = -9


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run learns that goes straight to its end, by stage and tuner; each is run once."""
    kept: dict[tuple[int, str], tuple[dict[str, bytes], list[Any]]] = {}

    def ask(stage: int, tuner: dict[str, Any]) -> tuple[dict[str, bytes], list[Any]]:
        key = (stage, tuner["type"])
        if key not in kept:
            job = make_job(tmp_path_factory.mktemp("straight"), tuner, zero={"stage": stage})
            assert go(job, 2) == [0, 0]
            kept[key] = learned(job), series(job)
        return kept[key]

    return ask


def series(job: Any) -> list[Any]:
    """Losses and gradient norms, a pair a step."""
    rows = [json.loads(line) for line in job.run.read("metrics.jsonl").splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def check(folder: Path, undisturbed: Any, stage: int, tuner: dict[str, Any], kills: list[Kill]) -> None:
    """Kill a run as often as asked, then let it end."""
    job = make_job(folder, tuner, zero={"stage": stage})
    for kill in kills:
        codes = go(job, 2, kill)
        assert codes[kill.rank] == KILLED, f"{kill}: {codes}"
        assert not job.run.exists(RESULT)
    assert go(job, 2) == [0, 0]
    adapter, rows = undisturbed(stage, tuner)
    assert learned(job) == adapter
    assert series(job) == rows


@pytest.mark.parametrize(
    ("stage", "tuner", "kills"),
    [
        (0, LORA, [Kill(0, "step", 1), Kill(0, "write", 2), Kill(0, "commit", 1)]),
        (2, FULL, [Kill(0, "commit", 2)]),
        (3, LORA, [Kill(1, "step", 8)]),
    ],
    ids=str,
)
def test_a_killed_run_ends_in_the_same_bits(
    tmp_path: Path, undisturbed: Any, stage: int, tuner: dict[str, Any], kills: list[Kill]
) -> None:
    check(tmp_path, undisturbed, stage, tuner, kills)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(40))
def test_killed_at_random(tmp_path: Path, undisturbed: Any, seed: int) -> None:
    """Every stage and tuner, any rank, anywhere, up to three times."""
    rng = random.Random(seed)
    stage, tuner = seed % 4, (LORA, FULL)[seed // 4 % 2]

    def draw(steps_left: int) -> Kill:
        where = rng.choice(["step", "step", "write", "commit"])
        if where == "step":
            return Kill(rng.randrange(2), where, rng.randint(1, steps_left))
        return Kill(0, where, 1)

    check(tmp_path, undisturbed, stage, tuner, [draw(most) for most in (8, 1, 1)[: rng.randint(1, 3)]])


def test_what_stands_after_a_kill_is_the_newest_finished_checkpoint(tmp_path: Path) -> None:
    job = make_job(tmp_path, LORA)
    assert go(job, 2, Kill(0, "commit", 3))[0] == KILLED
    assert complete(job.run, CHECKPOINTS) == [f"{CHECKPOINTS}/{step:08d}" for step in (2, 4)]
    assert job.run.folders(CHECKPOINTS)[-1] == f"{6:08d}"  # without a manifest, so it is none
    assert go(job, 1) == [0]
    assert [step for step, *_ in series(job)] == [float(step) for step in range(1, 10)]


@pytest.mark.parametrize(("rank", "last"), [(0, {7}), (1, {7, 8})])
def test_a_kill_costs_the_steps_since_the_last_checkpoint_and_no_other(
    tmp_path: Path, rank: int, last: set[int]
) -> None:
    """Killed in its eighth step, two after the second checkpoint. The other one, which tells, may get through it."""
    job = make_job(tmp_path, LORA, checkpoints={"every": 3})
    assert go(job, 2, Kill(rank, "step", 8, saved=6))[rank] == KILLED
    first, rows = told(job), series(job)
    assert first == [step for step, *_ in rows] == list(range(1, len(first) + 1)) and len(first) in last
    assert go(job, 2) == [0, 0]
    assert told(job)[len(first) :] == [7, 8, 9], "it goes on from the last multiple of checkpoints.every"
    assert [step for step, *_ in series(job)] == list(range(1, 10))
    assert series(job)[: len(rows)] == rows, "what was made again is the same"


@pytest.mark.parametrize("where", ["write", "commit"])
def test_a_kill_in_a_long_write_costs_no_more_than_the_steps_between_two(tmp_path: Path, where: str) -> None:
    """Others could make a dozen steps meanwhile."""
    job = make_job(tmp_path, LORA, checkpoints={"every": 3}, steps=30)
    assert go(job, 2, Kill(0, where, 2, patience_s=1.0))[0] == KILLED
    assert complete(job.run, CHECKPOINTS) == [f"{CHECKPOINTS}/{3:08d}"]
    assert told(job) == [1, 2, 3, 4, 5, 6], "the second checkpoint, of step 6, was being written"


@pytest.mark.parametrize(
    ("workers", "tuner"),
    [
        pytest.param(1, FULL, id="1-full"), pytest.param(3, LORA, id="3-lora"),
        pytest.param(1, LORA, id="1-lora", marks=pytest.mark.soak),
        pytest.param(3, FULL, id="3-full", marks=pytest.mark.soak),
    ],
)  # fmt: skip
def test_a_run_goes_on_with_other_workers(
    tmp_path: Path, undisturbed: Any, workers: int, tuner: dict[str, Any]
) -> None:
    """Sums of other shares round differently."""
    job = make_job(tmp_path, tuner, zero={"stage": 2})
    assert go(job, 2, Kill(1, "step", 6))[1] == KILLED
    assert go(job, workers) == [0] * workers
    adapter, rows = undisturbed(2, tuner)
    found = series(job)
    assert [step for step, *_ in found] == [step for step, *_ in rows]
    assert [loss for _, loss, _ in found] == pytest.approx([loss for _, loss, _ in rows], rel=1e-5)
    ours, theirs = (flat(files) for files in (learned(job), adapter))
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-5


def flat(files: dict[str, bytes]) -> Tensor:
    """All weights of an adapter in one row."""
    (name,) = (name for name in files if name.endswith(("adapter_model.safetensors", "delta.safetensors")))
    tensors = load(files[name])
    return torch.cat([tensors[key].flatten() for key in sorted(tensors)])
