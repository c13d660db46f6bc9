"""A job on a cluster that has no place for it and an autoscaler: Ray's own, whose machines are processes here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from gtl.adapters import Registry
from tests.ports import free_port

pytestmark = pytest.mark.soak
ROOT = Path(__file__).resolve().parents[2]
GTL = "from gtl.cli import main; main()"
TOKEN = "a-token-of-this-test-alone-9876543210"
HEAD, HEAD_ID = "ray.head.default", "f" * 51 + "00000"
"""As Ray's provider of such machines calls the first."""
SECOND = {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_NODE_TYPE_NAME": HEAD,
          "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}  # fmt: skip
"""What `ray up` and KubeRay tell a head whose autoscaler is the second."""
LISTS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
)  # fmt: skip
LONG_S = 600


@dataclass(frozen=True)
class Growing:
    """The cluster, and somebody outside who works with it."""

    url: str
    folder: Path

    def nodes(self) -> list[dict[str, Any]]:
        """All that there ever were, as the dashboard lists them; none while it does not answer."""
        request = urllib.request.Request(f"{self.url}/api/v0/nodes?detail=1")
        request.add_header("Authorization", f"Bearer {TOKEN}")
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return list(json.load(answer)["data"]["result"]["result"])
        except (urllib.error.URLError, OSError):
            return []

    def submit(self, name: str, workers: int) -> subprocess.CompletedProcess[str]:
        """Train with so many workers of 2 CPUs, to the end."""
        recipe = {
            "model": {"source": "builtin:tiny"},
            "tuner": {"type": "lora", "rank": 2},
            "data": {"source": "builtin:scenes?count=8", "resolution": 64},
            "train": {"steps": 2, "batch_size": 2, "workers": workers, "cpus_per_worker": 2, "gpus_per_worker": 0},
            "evaluate": {"prompts": []},
            "storage": {place: str(self.folder / place) for place in ("runs", "cache", "registry")},
        }
        tree = self.folder / "tree"
        tree.mkdir(exist_ok=True)
        (tree / f"{name}.yaml").write_text(json.dumps(recipe))
        command = [sys.executable, "-c", GTL, "submit", "--follow", "--recipe-only", "--", "train", f"{name}.yaml"]
        found = subprocess.run(command, cwd=tree, env=environment(RAY_API_SERVER_ADDRESS=self.url), text=True,
                               capture_output=True, timeout=LONG_S)  # fmt: skip
        print(found.stdout, found.stderr, sep="\n--- stderr\n")
        return found


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, **changes}


def configuration(address: str) -> dict[str, Any]:
    """Of an autoscaler that may add two machines of two CPUs to a head that has none."""
    worker = {"resources": {"CPU": 2, "object_store_memory": 100 * 2**20}, "min_workers": 0, "max_workers": 2}
    return {
        "cluster_name": "growing", "max_workers": 2, "idle_timeout_minutes": 1, "upscaling_speed": 1.0,
        "provider": {"type": "external", "module": "tests.machines.Machines", "gcs_address": address,
                     "head_node_id": HEAD_ID,
                     "launch_multiple": True, "use_node_id_as_ip": True, "disable_node_updaters": True,
                     "disable_launch_config_check": True},
        "available_node_types": {
            HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {**worker, "node_config": {}},
        },
        "head_node_type": HEAD, "auth": {}, "file_mounts": {}, "file_mounts_sync_continuously": False,
        **{name: [] for name in LISTS},
    }  # fmt: skip


@pytest.fixture
def growing(request: pytest.FixtureRequest) -> Iterator[Growing]:
    """With the second of Ray's autoscalers, or the first."""
    folder = Path(tempfile.mkdtemp(prefix="gtl-", dir="/tmp"))  # short: Ray's sockets are in it
    port, own, python = free_port(), free_port(), Path(sys.executable).parent
    cluster = Growing(f"http://127.0.0.1:{port}", folder)
    (folder / "autoscaling.yaml").write_text(json.dumps(configuration(f"127.0.0.1:{own}")))
    command = [
        str(python / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1",
        f"--port={own}", "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}",
        f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}", "--num-cpus=0",
        f"--object-store-memory={200 * 2**20}", f"--temp-dir={folder}",
        f"--autoscaling-config={folder}/autoscaling.yaml",
    ]  # fmt: skip
    told = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "PATH": f"{python}:{os.environ['PATH']}"}
    told |= SECOND if request.param == "v2" else {}
    log = folder / "start.log"
    with log.open("w") as sink:
        head = psutil.Popen(command, env=environment(**told), stdout=sink, stderr=sink, cwd=folder)
        try:
            wait_for(lambda: cluster.nodes() or head.poll() is not None)
            assert head.poll() is None, log.read_text()
            yield cluster
        finally:
            machines = head.children(recursive=True) if head.poll() is None else []
            head.terminate()
            head.wait(60)
            _, left = psutil.wait_procs(machines, 10)  # the head ends its own processes, and not its machines'
            for process in left:
                process.kill()
            shutil.rmtree(folder, ignore_errors=True)


def wait_for(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LONG_S
    while not what():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.5)


@pytest.mark.parametrize("growing", ["v1", "v2"], indirect=True)
def test_a_job_gets_the_machine_that_it_needs_and_leaves_it_to_go(growing: Growing) -> None:
    done = growing.submit("small", workers=1)
    assert done.returncode == 0
    assert "cluster waiting until it has 2 CPUs\n" in done.stdout
    (version,) = Registry(growing.folder / "registry").versions("small")
    assert f"adapter small@{version}\n" in done.stdout
    cpus = [node["resources_total"].get("CPU", 0) for node in growing.nodes()]
    assert sorted(cpus) == [0, 2]
    wait_for(lambda: [node["state"] for node in growing.nodes()].count("ALIVE") == 1)


@pytest.mark.parametrize("growing", ["v2"], indirect=True)
def test_more_than_an_autoscaler_may_add_is_refused_in_one_line_and_adds_nothing(growing: Growing) -> None:
    done = growing.submit("large", workers=3)
    assert done.returncode == 2
    refusal = "train.workers: the cluster cannot grow to 6 CPUs, as its autoscaler says; ask less"
    assert [line for line in (done.stdout + done.stderr).splitlines() if "cannot grow" in line] == [f"error: {refusal}"]
    assert len(growing.nodes()) == 1
    assert not list(growing.folder.glob("runs/*")) and not list(growing.folder.glob("registry/*"))
