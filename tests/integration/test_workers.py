"""Pictures by several processes are those of one, also when a process is killed or a machine lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest

from gtl.config.objectives import PriorPreservation
from gtl.families import open_family
from gtl.generate.class_images import class_folder, class_images, file_name
from gtl.generate.command import run
from gtl.generate.images import generate
from gtl.generate.request import Request
from gtl.generate.spread import Model, Order, Origin, Published, spread
from gtl.images import encode_png, read_recipe
from gtl.storage import Store
from gtl.types import UserError
from tests.loras import publish_dog

ROOT = Path(__file__).resolve().parents[2]
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
REQUEST = Request("a photo of a dog", 64, 64, steps=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a registry with a LoRA of it."""
    return publish_dog(tmp_path_factory.mktemp("workers"))


def make_order(place: Path, *adapters: str) -> Order:
    source = str(place / "model")
    published = tuple(Published(str(place / "registry"), name) for name in adapters)
    return Order(Model(Origin(source), open_family(source).fingerprint(), published), REQUEST)


def painters() -> list[int]:
    """Process ids of the cluster's actors that draw."""
    from ray._private.state import actors

    known = actors().values()
    return [actor["Pid"] for actor in known if actor["ActorClassName"] == "Painter" and actor["State"] == "ALIVE"]


def test_two_workers_draw_the_files_of_one_process_though_one_is_killed(ray_cluster: None, place: Path) -> None:
    states: list[str] = []

    def watch(phase: str, done: int, total: int, detail: str = "") -> None:
        states.append(detail)
        if states[-2:] == ["2 of 2 workers"] * 2 and "killed" not in states:  # and both have a batch
            os.kill(painters()[0], signal.SIGKILL)
            states.append("killed")

    options = {"prompt": "a photo of a dog", "adapters": ["dog:0.5"], "registry": str(place / "registry"),
               "seed": 3, "steps": 2, "count": 8}  # fmt: skip
    alone = run(out=place / "alone", **options)
    together = run(out=place / "together", **options, workers=2, progress=watch)
    assert "1 of 2 workers" in states[states.index("killed") :]
    assert [path.name for path in together] == [*(f"{i:04d}.png" for i in range(8)), "grid.png"]
    # In batches of four here and there, so that sums are rounded in the same order.
    assert [path.read_bytes() for path in together] == [path.read_bytes() for path in alone]
    assert painters() == []


def test_class_images_that_are_missing_are_drawn(ray_cluster: None, place: Path, tmp_path: Path) -> None:
    family, prior = open_family(str(place / "model")), PriorPreservation(prompt="a dog", images=3, steps=2)
    folder = class_folder(family, prior, Store(tmp_path), "fp32")
    for seed in (0, 2):
        folder.write(file_name(seed), b"kept")
    drawn = class_images(family, Origin(str(place / "model")), prior, Store(tmp_path), dtype="fp32")
    assert drawn.root == folder.root
    request = Request("a dog", 64, 64, seed=1, steps=2, guidance=prior.guidance)
    ((_, image),) = generate(family, [request])
    expected = encode_png(image, {**asdict(request), "model": family.fingerprint(), "dtype": "float32"})
    assert [folder.read(f"0000{seed}.png") for seed in range(3)] == [b"kept", expected, b"kept"]


def test_a_mistake_on_a_worker_is_one_line(ray_cluster: None, place: Path) -> None:
    orders = [make_order(place, "cat@v1")]
    with pytest.raises(UserError) as error, closing(spread(orders)) as pictures:
        next(pictures)
    message = f"adapter 'cat': not in the registry {place / 'registry'}; adapters there: dog (a worker on "
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert painters() == []


def test_more_workers_than_there_is_room_for_are_refused(ray_cluster: None, place: Path) -> None:
    with pytest.raises(UserError, match=r"^--workers: 5: each takes one CPU; the cluster has 3$"):
        next(spread([make_order(place)] * 9, workers=5))


def test_pictures_that_every_worker_dies_over_end_it_in_one_line(ray_cluster: None, place: Path) -> None:
    killed: list[int] = []

    def kill(phase: str, done: int, total: int, detail: str = "") -> None:
        if detail == "1 of 1 workers":
            new = [number for number in painters() if number not in killed]
            killed.extend(new)
            for number in new:
                os.kill(number, signal.SIGKILL)

    with pytest.raises(UserError) as error, closing(spread([make_order(place)] * 2, workers=1, progress=kill)) as drawn:
        next(drawn)
    assert str(error.value).startswith(
        "3 workers died over pictures like 'a photo of a dog' (64x64): The actor is dead"
    )
    assert "\n" not in str(error.value)
    assert len(killed) == 3


def start(place: Path, out: Path, address: str, count: int) -> subprocess.Popen[str]:
    """The command, with two workers."""
    words = ["generate", "--model", str(place / "model"), "--prompt", "a dog", "--count", str(count), "--out", str(out)]
    command = [sys.executable, "-c", "from gtl.cli import main; main()", *words, "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": address}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(what: Callable[[], bool], command: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not what():
        assert command.poll() is None and time.monotonic() < deadline, command.communicate()[1]
        time.sleep(0.05)


@pytest.mark.soak
def test_a_machine_that_is_lost_costs_no_picture_though_there_is_no_other(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the raylets, and so of their workers
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        node = cluster.add_node(**NODE)
        command = start(place, tmp_path, cluster.address, 160)
        wait_for(lambda: len(list(tmp_path.glob("*.png"))) >= 16, command)
        cluster.remove_node(node, allow_graceful=False)
        _, errors = command.communicate(timeout=300)
    finally:
        cluster.shutdown()
    assert command.returncode == 0, errors
    assert len(list(tmp_path.glob("0*.png"))) == 160


@pytest.mark.soak
def test_ctrl_c_ends_it_and_leaves_whole_pictures_and_nothing_that_runs(place: Path, tmp_path: Path) -> None:
    command = start(place, tmp_path, "local", 2000)
    wait_for(lambda: len(list(tmp_path.glob("*.png"))) >= 4, command)
    os.killpg(command.pid, signal.SIGINT)
    _, errors = command.communicate(timeout=60)
    assert command.returncode == 130
    assert "Traceback" not in errors
    for file in tmp_path.glob("*.png"):
        assert read_recipe(file)["prompt"] == "a dog"
    assert subprocess.run(["pgrep", "--session", str(command.pid)], capture_output=True, text=True).stdout == ""
