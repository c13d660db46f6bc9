"""Distillation in whole runs: what is learned depends neither on the ZeRO stage nor on the number of workers."""

import json
from pathlib import Path

import pytest

from gtl.train.job import Job
from tests.engine.runs import go, make_job


def losses(job: Job) -> list[float]:
    rows = [json.loads(line) for line in job.run.read("metrics.jsonl").decode().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(("workers", "stage"), [(2, 0), (2, 1), (2, 2), (2, 3)])
def test_few_steps_are_learned_the_same_on_any_workers(tmp_path: Path, workers: int, stage: int) -> None:
    objective = {"type": "consistency", "guidance": 3.0}
    alone = make_job(tmp_path / "alone", objective=objective, learning_rate=1e-2, steps=5)
    spread = make_job(
        tmp_path / "spread", objective=objective, learning_rate=1e-2, steps=5, workers=workers, zero={"stage": stage}
    )
    assert go(alone, 1) == [0] and go(spread, workers) == [0] * workers
    assert losses(spread) == pytest.approx(losses(alone), rel=2e-4)
    assert len(set(losses(alone))) == 5
