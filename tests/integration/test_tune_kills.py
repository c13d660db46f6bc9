"""Studies whose processes and machines are killed under them: they go on, and nothing that is done is done again."""

from __future__ import annotations

import json
import os
import shutil
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
        self, place: Path, name: str, address: str, rates: list[float], pack: int | str = "off",
        asked: dict[str, Any] | None = None, **train: Any,
    ) -> None:  # fmt: skip
        self.runs, self.name, self.address = place / "runs" / name, name, address
        self.registry, self.file = place / "registry" / name, place / f"{name}.yaml"
        self.file.write_text(json.dumps({
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
            **(asked or {}),
        }))  # fmt: skip
        self.start()

    def start(self, *more: str) -> None:
        """Run the command."""
        environment = {**os.environ, "RAY_ADDRESS": self.address, "PYTHONPATH": str(ROOT)}
        self.command = subprocess.Popen(
            [*COMMAND, str(self.file), *more], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip

    def kill(self) -> None:
        """End the command as a machine that loses its power does."""
        self.command.send_signal(signal.SIGKILL)
        self.command.communicate()
        assert self.read()["ended"] is None, "it was too late"

    def read(self) -> dict[str, Any]:
        """Its record."""
        found: dict[str, Any] = json.loads(next(self.runs.glob("*/study.json")).read_text())
        return found

    def files(self, name: str) -> dict[Path, int]:
        """Files of a name below its runs and among what it published -> when each was written."""
        return {path: path.stat().st_mtime_ns for root in (self.runs, self.registry) for path in root.rglob(name)}

    def rows(self, trial: int) -> list[int]:
        """Steps in a trial's record."""
        files = self.runs.glob(f"*/trials/{trial:05d}/*/metrics.jsonl")
        lines = [line for file in files for line in file.read_text().splitlines()]
        return [json.loads(line)["step"] for line in lines if line.endswith("}")]

    def saved(self, trial: int) -> bool:
        return any(self.runs.glob(f"*/trials/{trial:05d}/*/checkpoints/*/manifest.json"))

    def wait_for(self, what: Callable[[], Any], every: float = 0.1) -> None:
        begun = time.monotonic()
        while not what():
            if self.command.poll() is not None or time.monotonic() - begun > LONG_S:
                self.command.kill()
                pytest.fail(self.command.communicate()[0][-6000:])
            time.sleep(every)

    def end(self) -> list[dict[str, Any]]:
        """The trials, when all is over."""
        try:
            said, _ = self.command.communicate(timeout=LONG_S)
        finally:
            self.command.kill()
        assert self.command.returncode == 0, said[-6000:]
        found: list[dict[str, Any]] = self.read()["trials"]
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


def test_a_trial_of_two_workers_loses_one_and_goes_on(cluster: Any, place: Path) -> None:
    cluster.add_node(num_cpus=1, **NODE)
    study = Study(place, "two_workers", cluster.address, [1e-3, 2e-3], workers=2)
    study.wait_for(lambda: study.saved(0))
    workers = processes(cluster, WORKER)
    assert len(workers) == 2
    workers[0].send_signal(signal.SIGKILL)
    assert len(study.rows(0)) < STEPS
    trials = study.end()
    assert [(trial["state"], trial["steps"]) for trial in trials] == [("finished", STEPS)] * 2
    assert [study.rows(number) for number in (0, 1)] == [[0, *range(1, STEPS + 1)]] * 2


def drawn(place: Path) -> set[Path]:
    """Pictures in the cache."""
    return set((place / "cache" / "samples").glob("*/*.png"))


def ranking(study: Study) -> list[tuple[str, float]]:
    """Those that were measured again, the best first."""
    return [(one["trial"], one["value"]) for one in study.read()["finalists"]]


def test_finalists_that_were_being_confirmed_are_ranked_alike(cluster: Any, place: Path) -> None:
    """Killed among the pictures of its finalists: the rest are drawn, and nothing that was learned is learned again."""
    evaluate = {"evaluate.prompts": ["a photo of a dog"], "evaluate.steps": 2, "evaluate.every": 20,
                "evaluate.beside.samples": 8}  # fmt: skip
    study = Study(place, "confirmed", cluster.address, [1e-3, 1e-2], steps=20, asked={
        "metric": "diversity", "set": evaluate, "confirm": {"top": 2, "samples": 48}, "publish": {"top": 2},
    })  # fmt: skip
    before = drawn(place)
    study.wait_for(lambda: 1 <= len(drawn(place) - before) < 90, every=0.02)
    study.kill()
    results, pictures = study.files("result.json"), drawn(place) - before
    assert len(results) == 2 and len(pictures) < 96 and not study.registry.exists()
    study.start("--resume")
    study.end()
    assert len(drawn(place) - before) == 96 and drawn(place) > pictures
    found, published = ranking(study), study.read()["published"]
    assert sorted(trial for trial, _ in found) == ["00000", "00001"] and len(published) == 2
    assert study.files("result.json") == results
    cards = study.files("adapter.json")

    # As one that nobody disturbs ranks them: from the same trials once more, with nothing left of the pictures.
    record = next(study.runs.glob("*/study.json"))
    record.write_text(json.dumps({**study.read(), "ended": None, "finalists": [], "published": []}))
    shutil.rmtree(place / "cache" / "samples")
    study.start("--resume")
    study.end()
    again = ranking(study)
    assert [trial for trial, _ in again] == [trial for trial, _ in found]
    assert [value for _, value in again] == pytest.approx([value for _, value in found], rel=1e-3)
    assert (study.read()["published"], study.files("adapter.json")) == (published, cards), "published once"


def test_what_was_being_published_is_published_once(cluster: Any, place: Path) -> None:
    """Killed between the first card of two and the second."""
    study = Study(place, "published", cluster.address, [1e-3, 2e-2], steps=20, asked={
        "set": {"evaluate.every": 20}, "confirm": {"top": 2}, "publish": {"top": 2},
    })  # fmt: skip
    study.wait_for(lambda: list(study.registry.glob("*/adapter.json")), every=0.002)
    study.kill()
    (first,) = study.registry.glob("*/adapter.json")
    card, written, results = first.read_bytes(), first.stat().st_mtime_ns, study.files("result.json")
    assert (len(results), study.read()["published"]) == (2, [])
    study.start("--resume")
    study.end()
    left = study.read()
    assert left["ended"] is not None and left["winner"]["trial"] == left["finalists"][0]["trial"]
    assert left["published"] == [f"published@{left['version']}-{trial}" for trial, _ in ranking(study)]
    assert first.parent.name == left["published"][0].partition("@")[2], "the winner is the first in both"
    assert sorted(path.parent.name for path in study.registry.glob("*/adapter.json")) == sorted(
        name.partition("@")[2] for name in left["published"]
    )
    assert (first.read_bytes(), first.stat().st_mtime_ns) == (card, written)
    assert study.files("result.json") == results
