"""Commands as jobs of a cluster that is not ours: with a dashboard, a token, and processes of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
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

from gtl import __version__
from gtl.adapters import Registry
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
GTL = "from gtl.cli import main; main()"
TOKEN = "a-token-of-this-test-alone-0123456789"
SECRET = "hunter2-of-this-test-alone"
RECIPE = """
model: {source: builtin:tiny}
tuner: {type: lora, rank: 2}
data: {source: "%s", resolution: 64}
train: {steps: %d, batch_size: 2, workers: 1, gpus_per_worker: 0, checkpoints: {every: 5, keep: 1000}}
evaluate: {prompts: []}
"""
SCENES = "builtin:scenes?count=8"
SITE = """
import hashlib, os, sys
from pathlib import Path
if os.environ.get("MY_TOKEN"):
    Path(%r).write_text(hashlib.sha256(os.environ["MY_TOKEN"].encode()).hexdigest())
"""
"""Python runs it when it begins, wherever the tree is on its path."""
WORKER = """
import hashlib, os, ray
from gtl.jobs import secrets

def seen():
    return hashlib.sha256(os.environ["MY_TOKEN"].encode()).hexdigest()

ray.init()
secrets.load()
print("driver", seen())
print("worker", ray.get(ray.remote(num_cpus=0)(seen).remote()))
secrets.wipe()
after = ray.remote(num_cpus=0)(lambda: "MY_TOKEN" in os.environ).options(runtime_env={"env_vars": {"A": "1"}})
print("left", ray.get(after.remote()))
"""
LONG_S = 600


@dataclass(frozen=True)
class Remote:
    """The cluster, and the tree of somebody who works with it from outside."""

    url: str
    address: str
    """Of the cluster itself, for machines that join it."""
    folder: Path
    """What Ray writes."""
    tree: Path

    def environment(self, **changes: str) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN,
                "RAY_API_SERVER_ADDRESS": self.url, **changes}  # fmt: skip

    def start(self, *arguments: str, **changes: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", GTL, *arguments]
        return subprocess.Popen(command, cwd=self.tree, env=self.environment(**changes), text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def run(self, *arguments: str, **changes: str) -> tuple[int, str, str]:
        """Exit status, stdout and stderr of a command of gtl."""
        command = self.start(*arguments, **changes)
        out, err = command.communicate(timeout=LONG_S)
        print(out, err, sep="\n--- stderr\n")
        return command.returncode, out, err

    def write(self, name: str, source: str = SCENES, steps: int = 4) -> str:
        (self.tree / f"{name}.yaml").write_text(RECIPE % (source, steps))
        return f"{name}.yaml"

    def request(self, path: str) -> urllib.request.Request:
        """Of the dashboard, with the token."""
        return urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {TOKEN}"})

    def jobs(self) -> list[dict[str, Any]]:
        status, out, _ = self.run("jobs", "list", "--json")
        assert status == 0
        return list(json.loads(out))


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    folder = Path(tempfile.mkdtemp(prefix="gtl-", dir="/tmp"))  # short: Ray's sockets are in it
    tree = tmp_path_factory.mktemp("tree")
    port, own = free_port(), free_port()
    remote = Remote(f"http://127.0.0.1:{port}", f"127.0.0.1:{own}", folder, tree)
    python = Path(sys.executable).parent
    command = [
        str(python / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1",
        f"--port={own}", "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}",
        f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}", "--num-cpus=3",
        f"--object-store-memory={200 * 2**20}", f"--temp-dir={folder}",
    ]  # fmt: skip
    environment = remote.environment(PATH=f"{python}:{os.environ['PATH']}")
    del environment["RAY_API_SERVER_ADDRESS"]
    with (folder / "start.log").open("w") as log:
        cluster = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
        try:
            wait_for(lambda: num_nodes(remote.url), cluster, folder / "start.log")
            yield remote
        finally:
            cluster.terminate()
            cluster.wait(60)
            shutil.rmtree(folder, ignore_errors=True)


def num_nodes(url: str) -> int:
    """That are alive. The dashboard knows of the first a while after its port is open."""
    request = urllib.request.Request(f"{url}/api/v0/nodes", headers={"Authorization": f"Bearer {TOKEN}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().count(b"ALIVE")
    except (urllib.error.URLError, OSError):
        return 0


def wait_for(what: Callable[[], Any], process: subprocess.Popen[Any], log: Path | None = None) -> Any:
    """What it returns, once it is true, which it has to become before a process ends."""
    deadline = time.monotonic() + LONG_S
    while not (found := what()):
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(log.read_text() if log else "it ended, or took too long")
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def trained(remote: Remote) -> tuple[str, str, Path]:
    """stdout and stderr of a training that was submitted with a secret, and the file that its process wrote."""
    seen = remote.tree.parent / "seen"
    (remote.tree / "sitecustomize.py").write_text(SITE % str(seen))
    recipe = remote.write("dog")
    status, out, err = remote.run("submit", "--follow", "--secret", "MY_TOKEN", "--", "train", recipe, MY_TOKEN=SECRET)
    assert status == 0
    return out, err, seen


def test_a_training_is_followed_to_its_adapter(remote: Remote, trained: tuple[str, str, Path]) -> None:
    out, err, _ = trained
    *_, report, adapter = out.splitlines()
    card = Registry(remote.tree / "registry").show("dog")
    assert adapter == f"adapter dog@{card.version}"
    assert report == f"report {remote.tree}/runs/dog/{card.version}/report.html"
    assert any(line.startswith("train 4/4 loss ") for line in out.splitlines())
    assert "Running entrypoint" not in out
    (job,) = [row for row in remote.jobs() if row["command"] == "train dog.yaml"]
    assert f"submitted {job['job']}, " in err
    assert (job["status"], job["exit_status"], job["attempt"]) == ("SUCCEEDED", 0, 1)


def test_the_same_again_is_the_same_job(remote: Remote, trained: tuple[str, str, Path]) -> None:
    before = remote.jobs()
    status, out, err = remote.run("submit", "--follow", "--", "train", str(remote.tree / "dog.yaml"))
    assert status == 0
    assert out.splitlines()[-1] == trained[0].splitlines()[-1]
    assert f"{before[-1]['job']}: the same was submitted before, and is succeeded" in err
    assert remote.jobs() == before


def test_of_two_who_send_the_same_at_once_the_second_has_the_job_of_the_first(remote: Remote) -> None:
    script = (
        "from gtl.jobs.client import connect; from gtl.jobs.parcel import Parcel; from gtl.jobs.submit import send\n"
        f"client = connect({remote.url!r})\n"
        "parcel = Parcel('train', ('train', 'none.yaml'), {}, False, 'none', {})\n"
        "print([(sent.job == parcel.id(1), sent.status) for sent in (send(client, parcel, 1, None) for _ in range(2))])"
    )
    done = subprocess.run([sys.executable, "-c", script], env=remote.environment(), capture_output=True, text=True)
    assert done.stdout == "[(True, None), (True, 'PENDING')]\n", done.stderr


def test_a_secret_reaches_the_command_and_nothing_that_is_kept_or_shown(
    remote: Remote, trained: tuple[str, str, Path]
) -> None:
    out, err, seen = trained
    assert seen.read_text() == hashlib.sha256(SECRET.encode()).hexdigest()
    told = {"out": out, "err": err}
    for path in ("/api/jobs/", "/api/v0/actors?detail=1", "/api/v0/workers?detail=1", "/api/v0/runtime_envs",
                 "/api/v0/tasks?detail=1"):  # fmt: skip
        told[path] = urllib.request.urlopen(remote.request(path), timeout=60).read().decode()
    assert "GTL_JOB_SECRETS" in told["/api/jobs/"]
    assert [where for where, text in told.items() if SECRET in text] == []
    files = [path for place in (remote.folder, remote.tree) for path in place.rglob("*") if path.is_file()]
    assert any(path.name.startswith("job-driver-gtl-train-") for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_a_secret_reaches_the_workers_until_the_job_takes_it_away(remote: Remote, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    script = (
        "import sys; from gtl.jobs.client import connect, put_secrets; from gtl.jobs.secrets import HOOK, KEY\n"
        "from gtl.jobs.follow import Output, follow\n"
        f"client = connect({remote.url!r}); key = put_secrets(client, {{'MY_TOKEN': {SECRET!r}}})\n"
        f"env = {{'working_dir': {str(tmp_path)!r}, 'env_vars': {{KEY: key}}, 'worker_process_setup_hook': HOOK}}\n"
        "job = client.submit_job(entrypoint='python worker.py', runtime_env=env)\n"
        "print(follow(client, job, Output(sys.stdout)).status)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=remote.environment(), capture_output=True, text=True)
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    told = [line for line in done.stdout.splitlines() if line.split()[0] in ("driver", "worker", "left", "SUCCEEDED")]
    assert told == [f"driver {digest}", f"worker {digest}", "left False", "SUCCEEDED"], done.stdout + done.stderr


def test_a_mistake_is_not_tried_again_but_may_be_sent_again(remote: Remote) -> None:
    recipe = remote.write("wrong", source="/nowhere/at/all")
    status, out, err = remote.run("submit", "--follow", "--retries", "2", "--", "train", recipe)
    assert status == 2
    assert out.splitlines()[-1] == "error: data.source: /nowhere/at/all: no such folder or file"
    assert "sent again" not in err
    (first,) = [row for row in remote.jobs() if row["command"] == "train wrong.yaml"]
    assert (first["status"], first["exit_status"]) == ("FAILED", 2)
    status, out, _ = remote.run("submit", "--", "train", recipe)
    assert (status, out) == (0, f"{first['job']}-2\n")
    assert remote.run("jobs", "logs", f"{first['job']}-2", "--follow")[0] == 2


def test_a_job_is_stopped_and_a_job_that_is_not_there_is_one_line(remote: Remote) -> None:
    status, out, _ = remote.run("submit", "--recipe-only", "--", "train", remote.write("long", steps=5000))
    assert status == 0
    job = out.strip()
    status, out, _ = remote.run("jobs", "stop", job)
    assert (status, out) == (0, f"stopping {job}; it saves first\n")
    assert remote.run("jobs", "logs", job, "--follow")[0] == 1
    assert remote.jobs()[-1]["status"] == "STOPPED"
    status, out, err = remote.run("jobs", "logs", "gtl-nothing")
    assert (status, out) == (2, "")
    assert err.startswith(f"error: job 'gtl-nothing': gtl sent no such job to {remote.url}; there are: gtl-")
    assert job in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RAY_AUTH_TOKEN": "wrong-" + TOKEN}, "refuses this token; set the cluster's, there or in ~/.ray/auth_token"),
        ({"RAY_AUTH_MODE": "disabled"}, "wants a token; set RAY_AUTH_MODE=token, and the token in RAY_AUTH_TOKEN or "),
    ],
)
def test_a_token_that_is_not_the_clusters_is_one_line(
    remote: Remote, environment: dict[str, str], message: str
) -> None:
    status, out, err = remote.run("submit", "--", "train", remote.write("dog"), **environment)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: RAY_AUTH_TOKEN: {remote.url} {message}")
    assert len(err.splitlines()) == 1


def test_who_joins_the_cluster_without_its_token_is_told_in_one_line(remote: Remote) -> None:
    status, _, err = remote.run("train", remote.write("dog"), RAY_ADDRESS=remote.address, RAY_AUTH_MODE="disabled")
    assert status == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: RAY_ADDRESS: '{remote.address}': no Ray cluster answers there (")
    assert line.endswith("; if it wants a token, set RAY_AUTH_MODE=token")


@pytest.fixture
def apart(remote: Remote, tmp_path: Path) -> Iterator[Path]:
    """A folder that is another one on the second machine of the cluster."""
    shared, folder = tmp_path / "shared", Path(tempfile.mkdtemp(prefix="gtl-", dir="/tmp"))
    shared.mkdir()
    ray = Path(sys.executable).parent / "ray"
    join = (
        f"mount -t tmpfs tmpfs {shared} && exec {ray} start --block --disable-usage-stats --address={remote.address} "
        f"--num-cpus=1 --object-store-memory={100 * 2**20} --temp-dir={folder} "
        f"--dashboard-agent-listen-port={free_port()}"
    )
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounts of its own are not allowed here")
    with (folder / "start.log").open("w") as log:
        node = subprocess.Popen(["unshare", "-m", "sh", "-c", join], env=remote.environment(), stdout=log, stderr=log)
        try:
            wait_for(lambda: num_nodes(remote.url) == 2, node, folder / "start.log")
            yield shared
        finally:
            node.terminate()
            node.wait(60)
            shutil.rmtree(folder, ignore_errors=True)


def test_stores_that_not_all_machines_have_are_refused_before_the_job(remote: Remote, apart: Path) -> None:
    recipe, before = remote.write("apart"), remote.jobs()
    status, out, err = remote.run("submit", "--", "train", recipe)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: storage.runs: {remote.tree}/runs: a folder of this machine, and the cluster has 2 ")
    stores = [f"storage.{name}={apart}/{name}" for name in ("runs", "cache", "registry")]
    settings = [word for store in stores for word in ("--set", store)]
    status, out, err = remote.run("submit", "--", "train", recipe, *settings)
    assert (status, out) == (2, "")
    line = err.splitlines()[-1]
    assert line.startswith(f"error: storage.runs: {apart}/runs: node ")
    assert "does not see what the job's own node writes there (no such file); name a bucket, or a folder that " in line
    assert list((apart / "runs").iterdir()) == []
    assert remote.jobs() == before


STORE = "storage.registry=s3://bucket-of-nobody/registry"


@pytest.mark.parametrize(
    ("program", "settings", "message"),
    [
        (f"import gtl; gtl.__version__ = '0.0.1'; {GTL}", [], "gtl: 0.0.1 where this was submitted, {gtl} on the "),
        (f"import platform; platform.python_version_tuple = lambda: ('3', '9', '0'); {GTL}", [],
         "python: 3.9 where this was submitted, {python} on the cluster; install the same version on both"),
        (GTL, ["--set", STORE], "storage.registry: s3://bucket-of-nobody/registry/.gtl-job-"),
    ],
    ids=["gtl", "python", "bucket"],
)  # fmt: skip
def test_what_only_the_cluster_knows_is_refused_before_the_job(
    remote: Remote, program: str, settings: list[str], message: str
) -> None:
    recipe, before = remote.write("ahead"), remote.jobs()
    command = [sys.executable, "-c", program, "submit", "--secret", "MY_TOKEN", "--", "train", recipe, *settings]
    done = subprocess.run(command, cwd=remote.tree, env=remote.environment(MY_TOKEN=SECRET), capture_output=True,
                          text=True)  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    *_, told, line = done.stderr.splitlines()
    assert told == "checking on the cluster: its gtl, storage.runs, storage.cache, storage.registry"
    python = ".".join(map(str, sys.version_info[:2]))
    assert line.startswith(f"error: {message.format(gtl=__version__, python=python)}")
    assert remote.jobs() == before


@pytest.mark.soak
def test_a_driver_that_is_killed_is_tried_again_and_goes_on(remote: Remote) -> None:
    following = remote.start("submit", "--follow", "--", "train", remote.write("killed", steps=60))
    runs = remote.tree / "runs" / "killed"
    wait_for(lambda: list(runs.glob("*/checkpoints/*/manifest.json")), following)
    driver(remote, "killed.yaml").send_signal(signal.SIGKILL)
    out, err = following.communicate(timeout=LONG_S)
    print(out, err, sep="\n--- stderr\n")
    assert following.returncode == 0
    (run,) = runs.iterdir()
    assert out.splitlines()[-1] == f"adapter killed@{run.name}"
    jobs = [row for row in remote.jobs() if row["command"] == "train killed.yaml"]
    assert [(row["attempt"], row["status"], row["exit_status"]) for row in jobs] == [
        (1, "FAILED", 137), (2, "SUCCEEDED", 0),
    ]  # fmt: skip
    assert f"{jobs[0]['job']} was lost (exit status 137); sent again as attempt 2, with 2 more left" in err
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))


def driver(remote: Remote, recipe: str) -> psutil.Process:
    """The process of the command itself, which the job's own waits for."""
    for process in psutil.process_iter(["cmdline", "cwd"]):
        line = process.info["cmdline"] or []
        if GTL in line and recipe in line and str(process.info["cwd"]).startswith(str(remote.folder)):
            return process
    pytest.fail(f"no process of train {recipe}")
