"""What Weights & Biases and MLflow get of a run, with the real libraries: a folder of runs, a run kept offline."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import wandb
from mlflow import MlflowClient
from wandb.proto.wandb_internal_pb2 import Record

from gtl.train.job import Job
from gtl.train.services import Services
from tests.waiting import eventually

ROWS: list[dict[str, Any]] = [
    {"step": 1, "steps": 2, "loss": 0.5, "val_loss": 0.75},
    {"step": 2, "steps": 2, "loss": 0.25, "device": "cpu"},
]


@pytest.fixture
def job() -> Job:
    recipe = {"model": {"source": "some/model"}, "train": {"steps": 2, "zero": {"stage": 2}}}
    return Job(recipe, "dog", "20260101-000000-abcdef", "d" * 64, "b" * 64, "fp32")


@pytest.fixture(autouse=True)
def nothing_set_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def complain(phase: str, done: int, total: int, detail: str = "") -> None:
    raise AssertionError(f"{phase}: {detail}")


def test_mlflow_has_every_value_at_its_step(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database would need more than mlflow-skinny brings
    first = Services(job, complain)
    first.log(ROWS[:1])
    first.close()
    client = MlflowClient()
    experiment = client.get_experiment_by_name("dog")
    assert experiment is not None
    (stopped,) = client.search_runs([experiment.experiment_id])
    assert stopped.info.status == "KILLED"

    second = Services(job, complain)  # --resume
    second.log(ROWS[1:])
    second.is_finished = True
    second.close()
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", job.version)
    assert run.data.params == {"model.source": "some/model", "train.steps": "2", "train.zero.stage": "2"}
    series = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]
    assert series == [(1, 0.5), (2, 0.25)]
    assert set(run.data.metrics) == {"loss", "val_loss"}
    assert mlflow.active_run() is None


def test_wandb_keeps_a_run_offline(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # of settings that an earlier test has read
    services = Services(job, complain)
    services.log(ROWS)
    services.log([{"step": 1, "kid": 0.125, "said": "step 1  kid 0.125"}])  # from beside training
    services.is_finished = True
    services.close()
    (folder,) = (tmp_path / "wandb").glob(f"offline-run-*-{job.version}")
    file = folder / f"run-{job.version}.wandb"
    # wandb has a process of its own, which writes on for a moment.
    assert eventually(lambda: any(record.HasField("exit") for record in read_records(file)))
    records = list(read_records(file))
    series = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records if record.HasField("history")
    ]  # fmt: skip
    kept = [{key: value for key, value in row.items() if not key.startswith("_")} for row in series]
    assert kept == [{"step": 1, "loss": 0.5, "val_loss": 0.75}, {"step": 2, "loss": 0.25}, {"step": 1, "kid": 0.125}]
    assert ("*", "step") in [(record.metric.glob_name, record.metric.step_metric) for record in records]
    assert wandb.run is None


def read_records(file: Path) -> Iterator[Record]:
    """What a run kept offline: LevelDB's log format, of one block as long as it is short."""
    data, at = file.read_bytes(), 7
    assert len(data) < 2**15
    while at < len(data):
        size = struct.unpack_from("<IHB", data, at)[1]
        yield Record.FromString(data[at + 7 : at + 7 + size])
        at += 7 + size


def test_nothing_is_sent_unless_it_is_set_up(job: Job, tmp_path: Path) -> None:
    services = Services(job, complain)
    services.log(ROWS)
    services.close()
    assert list(tmp_path.iterdir()) == []


def test_a_service_that_fails_is_named_once_and_the_run_goes_on(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    services = Services(job, lambda phase, done, total, detail="": said.append(f"{phase} {detail}"))
    services.log(ROWS)
    services.close()
    assert len(said) == 1
    assert said[0].startswith("tracking mlflow: ")
    assert said[0].endswith("the run goes on without it")


ASKING = """
import psutil
from gtl.train.services import uses_wandb
print(uses_wandb(), psutil.Process().children())
"""


def test_who_is_logged_in_nowhere_has_no_process_of_a_service(tmp_path: Path) -> None:
    """It would outlive the question, and die of a signal that the run survives."""
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", ASKING], env=environment, capture_output=True, text=True)
    assert done.stdout == "False []\n", done.stderr
