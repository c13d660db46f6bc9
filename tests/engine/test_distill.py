"""Distillation in whole runs: what is learned depends neither on the ZeRO stage nor on the number of workers."""

import json
from pathlib import Path

import pytest

from gtl.train.job import Job
from tests.engine.runs import go, make_job


def losses(job: Job) -> list[float]:
    rows = [json.loads(line) for line in job.run.read("metrics.jsonl").decode().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


KINDS = {
    "few steps": ({"type": "lora", "rank": 4}, {"type": "consistency", "guidance": 3.0}, 1e-2),
    "a student": ({"type": "full"}, {"type": "distill", "teacher": "builtin:tiny"}, 1e-3),
}
"""Tuner, objective and learning rate. The student begins as its teacher, and the task leads it away."""


@pytest.mark.parametrize(("kind", "stage"), [("few steps", 0), ("few steps", 2), ("few steps", 3), ("a student", 3)])
def test_what_is_learned_is_the_same_on_any_workers(tmp_path: Path, kind: str, stage: int) -> None:
    tuner, objective, rate = KINDS[kind]
    alone = make_job(tmp_path / "alone", tuner, objective, learning_rate=rate, steps=5)
    spread = make_job(
        tmp_path / "spread", tuner, objective, learning_rate=rate, steps=5, workers=2, zero={"stage": stage}
    )
    assert go(alone, 1) == [0] and go(spread, 2) == [0, 0]
    assert losses(spread) == pytest.approx(losses(alone), rel=2e-4)
    assert len(set(losses(alone))) == 5
