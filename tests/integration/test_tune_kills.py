"""Studies whose processes and machines are killed under them: they go on, and nothing that is done is done again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.ports import free_port
from tests.tiny import make_sd, write_pictures

pytestmark = pytest.mark.soak
ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "from gtl.cli import main; main()", "tune"]
LONG_S = 900
STEPS = 400
NODE = {"object_store_memory": 100 * 2**20}
DRIVER, WORKER = ("ray::ResourceTrainable", "ray::Trial"), ("ray::RayTrainWorker",)
PACK = ("ray::PackActor",)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head node with one CPU, and what tells Ray Train whether a run's controller lives: the dashboard."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the raylets, and so of their workers
    head = {**NODE, "num_cpus": 1, "include_dashboard": True, "dashboard_port": free_port()}
    running = Cluster(initialize_head=True, head_node_args=head)
    yield running
    running.shutdown()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and twelve captioned pictures."""
    folder = tmp_path_factory.mktemp("kills")
    make_sd(folder / "model")
    write_pictures(folder / "images", [(64, 64)] * 12)
    return folder


class Study:
    """A command that runs one."""

    def __init__(
        self, place: Path, name: str, address: str, rates: list[float], pack: int | str = "off", **train: Any
    ) -> None:
        self.runs, self.name = place / "runs" / name, name
        file = place / f"{name}.yaml"
        file.write_text(json.dumps({
            "recipe": {
                "model": {"source": str(place / "model")},
                "tuner": {"type": "lora", "rank": 4},
                "data": {"source": str(place / "images"), "resolution": 64, "validation": 0.25},
                "train": {"steps": STEPS, "batch_size": 4, "workers": 1, "gpus_per_worker": 0,
                          "checkpoints": {"every": 10}, **train},
                "evaluate": {"every": 50, "prompts": []},
                "storage": {kind: str(place / kind) for kind in ("runs", "cache", "registry")},
            },
            "space": {"train.learning_rate": {"choice": rates}}, "metric": "val_loss",
            "searcher": {"type": "grid"}, "scheduler": {"type": "fifo"}, "confirm": {"top": 0}, "pack": pack,
        }))  # fmt: skip
        environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}
        self.command = subprocess.Popen(
            [*COMMAND, str(file)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def rows(self, trial: int) -> list[int]:
        """Steps in a trial's record."""
        files = self.runs.glob(f"*/trials/{trial:05d}/*/metrics.jsonl")
        lines = [line for file in files for line in file.read_text().splitlines()]
        return [json.loads(line)["step"] for line in lines if line.endswith("}")]

    def saved(self, trial: int) -> bool:
        return any(self.runs.glob(f"*/trials/{trial:05d}/*/checkpoints/*/manifest.json"))

    def wait_for(self, what: Callable[[], Any]) -> None:
        begun = time.monotonic()
        while not what():
            if self.command.poll() is not None or time.monotonic() - begun > LONG_S:
                self.command.kill()
                pytest.fail(self.command.communicate()[0][-6000:])
            time.sleep(0.1)

    def end(self) -> list[dict[str, Any]]:
        """The trials, when all is over."""
        try:
            said, _ = self.command.communicate(timeout=LONG_S)
        finally:
            self.command.kill()
        assert self.command.returncode == 0, said[-6000:]
        found: list[dict[str, Any]] = json.loads(next(self.runs.glob("*/study.json")).read_text())["trials"]
        return found


def processes(cluster: Any, titles: tuple[str, ...]) -> list[psutil.Process]:
    """Of Ray's on the cluster's nodes those that are called so."""
    found = []
    for node in cluster.list_all_nodes():
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        found += [child for child in raylet.children(recursive=True) if title_of(child).startswith(titles)]
    return found


def title_of(process: psutil.Process) -> str:
    """What it calls itself; nothing if it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_trial_survives_its_driver_and_its_worker_and_names_what_it_does_not_survive(
    cluster: Any, place: Path
) -> None:
    study = Study(place, "processes", cluster.address, [1e-3, 2e-3])
    study.wait_for(lambda: study.saved(0))
    for process in processes(cluster, WORKER):
        process.send_signal(signal.SIGKILL)
    at = len(study.rows(0))
    study.wait_for(lambda: len(study.rows(0)) > at + 20)  # Ray Train went on
    (driver,) = processes(cluster, DRIVER)
    driver.send_signal(signal.SIGKILL)
    study.wait_for(lambda: study.saved(1))
    killed: set[int] = {driver.pid}
    for _ in range(2):
        study.wait_for(lambda: {one.pid for one in processes(cluster, DRIVER)} - killed)
        (driver,) = (one for one in processes(cluster, DRIVER) if one.pid not in killed)
        killed.add(driver.pid)
        driver.send_signal(signal.SIGKILL)
    first, second = study.end()
    assert (first["state"], first["steps"]) == ("finished", STEPS)
    assert study.rows(0) == [0, *range(1, STEPS + 1)]
    assert second["state"] == "failed"
    assert second["reason"].startswith("its process died: ") and "\n" not in second["reason"]


def test_packed_trials_survive_the_process_that_they_share(cluster: Any, place: Path) -> None:
    study = Study(place, "packs", cluster.address, [1e-3, 2e-3], pack=2)
    study.wait_for(lambda: study.saved(0) and study.saved(1))
    (pack,) = processes(cluster, PACK)
    pack.send_signal(signal.SIGKILL)
    assert max(len(study.rows(number)) for number in (0, 1)) < STEPS
    trials = study.end()
    assert [(trial["state"], trial["steps"]) for trial in trials] == [("finished", STEPS)] * 2
    assert [study.rows(number) for number in (0, 1)] == [[0, *range(1, STEPS + 1)]] * 2


def test_a_study_survives_a_node(cluster: Any, place: Path) -> None:
    node = cluster.add_node(num_cpus=1, **NODE)
    study = Study(place, "nodes", cluster.address, [1e-3, 2e-3])
    study.wait_for(lambda: study.saved(0) and study.saved(1))
    cluster.remove_node(node, allow_graceful=False)
    assert max(len(study.rows(number)) for number in (0, 1)) < STEPS
    trials = study.end()
    assert [(trial["state"], trial["steps"]) for trial in trials] == [("finished", STEPS)] * 2
    assert [study.rows(number) for number in (0, 1)] == [[0, *range(1, STEPS + 1)]] * 2
