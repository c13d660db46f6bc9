"""Domain adaptation in whole runs: what is learned on any workers, and what becomes of the network that judges."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from gtl.train.checkpoint import MANIFEST, latest
from gtl.train.job import CHECKPOINTS, Job
from gtl.train.worker import run
from gtl.types import UserError
from tests.engine.group import Group
from tests.engine.runs import FEW, Kill, go, learned, make_job

LORA = {"type": "lora", "rank": 4}
FULL = {"type": "full"}


def run_of(folder: Path, method: str, tuner: dict[str, Any], **train: Any) -> Job:
    """Half of the images are of the target domain."""
    objective = {"type": "align", "target": FEW, "method": method, "weight": 0.5}
    rate = 1e-2 if tuner["type"] == "lora" else 1e-3
    return make_job(folder, tuner, objective, targets=5, learning_rate=rate, steps=5, **train)


def series(job: Job, name: str) -> list[float]:
    rows = [json.loads(line) for line in job.run.read("metrics.jsonl").decode().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize(
    ("stage", "tuner"), [(0, LORA), (3, LORA), pytest.param(2, FULL, marks=pytest.mark.soak)]
)  # fmt: skip
def test_a_judge_of_single_samples_learns_the_same_on_any_workers(
    tmp_path: Path, stage: int, tuner: dict[str, Any]
) -> None:
    """Three images a step: the two workers have unequal shares."""
    alone = run_of(tmp_path / "alone", "dann", tuner)
    spread = run_of(tmp_path / "spread", "dann", tuner, workers=2, zero={"stage": stage})
    assert go(alone, 1) == [0] and go(spread, 2) == [0, 0]
    for name in ("loss", "domain", "mse"):
        assert series(spread, name) == pytest.approx(series(alone, name), rel=2e-4)
    assert len(set(series(alone, "domain"))) == 5


@pytest.mark.parametrize(
    ("method", "stage", "tuner"), [("mmd", 2, LORA), pytest.param("coral", 3, FULL, marks=pytest.mark.soak)]
)
def test_a_statistic_is_of_each_forward_pass_whoever_runs_it(
    tmp_path: Path, method: str, stage: int, tuner: dict[str, Any]
) -> None:
    """Two passes of four: one worker after the other's, or one each. An epoch's last two images have none."""
    alone = run_of(tmp_path / "alone", method, tuner, batch_size=8, micro_batch=4)
    spread = run_of(
        tmp_path / "spread", method, tuner, batch_size=8, micro_batch=4, workers=2, zero={"stage": stage}
    )  # fmt: skip
    assert go(alone, 1) == [0] and go(spread, 2) == [0, 0]
    for name in ("loss", "domain", "mse"):
        assert series(spread, name) == pytest.approx(series(alone, name), rel=2e-4, abs=1e-7)
    assert sum(value == 0 for value in series(alone, "domain")) == 2, "in five steps of an epoch of two"


def mistake(job: Job) -> str:
    with pytest.raises(UserError) as caught:
        run(job, torch.device("cpu"), lambda row: None)
    return str(caught.value)


def test_too_small_a_forward_pass_is_refused(tmp_path: Path, solo: Group) -> None:
    (said,) = solo.run(mistake, run_of(tmp_path, "mmd", LORA, batch_size=8, micro_batch=2))
    assert said.startswith("train.micro_batch: 2: 5 of 10 images of 64x64 pixels are of objective.target, so that not ")


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.soak), 3])
def test_the_judge_is_in_checkpoints_and_not_in_what_is_published(tmp_path: Path, stage: int) -> None:
    straight, killed = (run_of(tmp_path / name, "dann", LORA, zero={"stage": stage}) for name in ("straight", "killed"))
    assert go(straight, 2) == [0, 0]
    assert go(killed, 2, Kill(1, "step", 4, saved=2))[1] == -9
    assert go(killed, 2) == [0, 0]
    assert learned(killed) == learned(straight)
    for name in ("loss", "domain", "grad_norm"):
        assert series(killed, name) == series(straight, name)
    adapter = load(learned(straight)["adapter/adapter_model.safetensors"])
    assert adapter and all("lora_" in name for name in adapter)
    key = latest(straight.run, CHECKPOINTS)
    kept = json.loads(straight.run.read(f"{key}/{MANIFEST}"))["players"]["denoiser"]["parameters"]
    assert kept.keys() - {name for name in kept if "lora_" in name} == {
        "critic.0.weight", "critic.0.bias", "critic.2.weight", "critic.2.bias", "passed"
    }  # fmt: skip
