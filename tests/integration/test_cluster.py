"""A run whose cluster gets larger and smaller under it: two nodes on this machine, each with its own raylet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gtl.config import Recipe, parse_recipe
from gtl.config.load import dump_recipe
from tests.tiny import make_sd, write_pictures

pytestmark = pytest.mark.soak
ROOT = Path(__file__).resolve().parents[2]
STEPS = 360
BATCH = 48
LONG_S = 1800
IMPATIENT = "import gtl.train.launch as launch; launch.GROW_S = 5; from gtl.cli import main; main()"
"""The command, but it looks for new nodes every five seconds: a run that lasts minutes is a long test."""
DRAIN_S = 30
"""From the notice to the loss of a node; clouds give from half a minute to two."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and as many captioned pictures as a batch takes, so that both of two workers have some that count."""
    folder = tmp_path_factory.mktemp("cluster")
    make_sd(folder / "model")
    write_pictures(folder / "images", [(64, 64)] * BATCH)
    return folder


def make_recipe(place: Path, **train: Any) -> Recipe:
    """Batches so large that the run outlives what is done to its cluster: nodes are counted every twenty seconds."""
    return parse_recipe({
        "model": {"source": str(place / "model")},
        "tuner": {"type": "lora", "rank": 4},
        "data": {"source": str(place / "images"), "resolution": 64},
        "train": {"steps": STEPS, "batch_size": BATCH, "learning_rate": 1e-4, "gpus_per_worker": 0, "max_failures": 0,
                  "checkpoints": {"every": 10, "keep": 1000}, **train},
        "evaluate": {"prompts": []},
        "storage": {name: str(place / name) for name in ("runs", "cache", "registry")},
    })  # fmt: skip


class Nodes:
    """A head node with one CPU, and those that come and go."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})

    def add(self) -> Any:
        return self.cluster.add_node(**NODE)

    def drain(self, node: Any) -> None:
        """Tell Ray that it will be gone in half a minute, as a cloud's agent does."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        deadline = int((time.time() + DRAIN_S) * 1000)
        preempted = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        is_accepted, why = GcsClient(address=self.cluster.address).drain_node(node.node_id, preempted, "", deadline)
        assert is_accepted, why

    def kill(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)


NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the raylets, and so of their workers
    running = Nodes()
    yield running
    running.cluster.shutdown()


def start(place: Path, name: str, recipe: Recipe, address: str) -> subprocess.Popen[str]:
    file = place / f"{name}.yaml"
    file.write_text(dump_recipe(recipe))
    command = [sys.executable, "-c", IMPATIENT, "train", str(file), "--name", name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": address}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(command: subprocess.Popen[str]) -> None:
    try:
        out, _ = command.communicate(timeout=LONG_S)
    finally:
        command.kill()
    assert command.returncode == 0, out[-6000:]
    print(out[-2000:])


def wait_for(what: Callable[[], bool], command: subprocess.Popen[str]) -> float:
    """Seconds until something is so, which it has to become before the command ends."""
    begun = time.monotonic()
    while not what():
        if command.poll() is not None or time.monotonic() - begun > LONG_S:
            command.kill()
            pytest.fail(command.communicate()[0][-6000:])
        time.sleep(0.1)
    return time.monotonic() - begun


def steps_of(place: Path, name: str) -> list[int]:
    files = list((place / "runs" / name).glob("*/metrics.jsonl"))
    return [json.loads(line)["step"] for file in files for line in file.read_text().splitlines() if line.endswith("}")]


def saved(place: Path, name: str) -> dict[int, int]:
    """Number of workers at each step whose checkpoint is kept."""
    found = {}
    for file in (place / "runs" / name).glob("*/checkpoints/*/manifest.json"):
        manifest = json.loads(file.read_text())
        found[manifest["step"]] = manifest["workers"]
    return dict(sorted(found.items()))


def weights(place: Path, name: str) -> Any:
    """What a run learned, in one row."""
    from safetensors.numpy import load_file

    (file,) = (place / "runs" / name).glob("*/adapter/adapter_model.safetensors")
    tensors = load_file(file)
    return np.concatenate([tensors[key].ravel() for key in sorted(tensors)]).astype(np.float64)


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Any:
    """The weights of one worker that nothing happens to, on a cluster of its own."""
    finish(start(place, "straight", make_recipe(place, workers=1), "local"))
    assert steps_of(place, "straight") == list(range(1, STEPS + 1))
    return weights(place, "straight")


def check(place: Path, name: str, undisturbed: Any) -> None:
    assert steps_of(place, name) == list(range(1, STEPS + 1))
    found = weights(place, name)
    distance = np.linalg.norm(found - undisturbed) / np.linalg.norm(undisturbed)
    print(f"{name}: {distance:.1e} from the undisturbed run; workers at {saved(place, name)}")
    assert distance <= 1e-5


def test_a_run_grows_onto_a_node_that_comes(place: Path, undisturbed: Any, nodes: Nodes) -> None:
    run = start(place, "grown", make_recipe(place, workers=[1, 2]), nodes.cluster.address)
    wait_for(lambda: len(steps_of(place, "grown")) > 3, run)
    nodes.add()
    seconds = wait_for(lambda: 2 in saved(place, "grown").values(), run)
    print(f"two workers saved {seconds:.0f} s after the node came")
    finish(run)
    workers = list(saved(place, "grown").values())
    assert workers == sorted(workers) and set(workers) == {1, 2}
    check(place, "grown", undisturbed)


def test_a_run_saves_before_its_node_goes_and_goes_on_with_one_worker(
    place: Path, undisturbed: Any, nodes: Nodes
) -> None:
    """Nothing else would save, and any failure that counted would end the run."""
    node = nodes.add()
    recipe = make_recipe(place, workers=[1, 2], checkpoints={"every": 1000, "keep": 1000})
    run = start(place, "drained", recipe, nodes.cluster.address)
    wait_for(lambda: len(steps_of(place, "drained")) > 10, run)
    assert saved(place, "drained") == {}
    nodes.drain(node)
    seconds = wait_for(lambda: list(saved(place, "drained").values()) == [2], run)
    assert seconds < DRAIN_S
    (step,) = saved(place, "drained")
    time.sleep(DRAIN_S - seconds)
    nodes.kill(node)
    begun = time.monotonic()
    finish(run)
    print(f"saved {seconds:.0f} s after the notice; ended {time.monotonic() - begun:.0f} s after the loss")
    assert 10 < step < STEPS
    assert saved(place, "drained") == {step: 2, STEPS: 1}
    check(place, "drained", undisturbed)


def test_a_run_goes_on_with_one_worker_when_a_node_is_lost(place: Path, undisturbed: Any, nodes: Nodes) -> None:
    node = nodes.add()
    run = start(place, "lost", make_recipe(place, workers=[1, 2], max_failures=1), nodes.cluster.address)
    wait_for(lambda: len(saved(place, "lost")) > 1, run)
    nodes.kill(node)
    seconds = wait_for(lambda: 1 in saved(place, "lost").values(), run)
    print(f"one worker saved {seconds:.0f} s after the node was lost")
    finish(run)
    workers = list(saved(place, "lost").values())
    assert workers == sorted(workers, reverse=True) and set(workers) == {1, 2}
    check(place, "lost", undisturbed)
