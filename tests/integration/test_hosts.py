"""Training, search and serving on several machines that share no disk, and what becomes of them as machines are lost.

The machines are Linux namespaces with addresses, names and disks of their own; where these are refused, nodes on
loopback. See `tests/hosts.py`.
"""

import base64
import io
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image

from gtl.config import parse_recipe
from gtl.config.load import dump_recipe
from tests.hosts import BUCKET, RayHosts, ray_hosts, refusal
from tests.serving.test_serve import same
from tests.tiny import write_pictures

pytestmark = pytest.mark.soak
STEPS, EVERY = 30, 5
LONG_S = 900
STORES = {name: f"s3://{BUCKET}/{name}" for name in ("runs", "cache", "registry")}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    """A head without work, and captioned pictures in the bucket."""
    why = refusal()
    print(f"machines of their own on loopback: {why}" if why else "machines of their own in namespaces")
    images = tmp_path_factory.mktemp("hosts") / "images"
    write_pictures(images, [(64, 64)] * 8)
    with ray_hosts(isolated=not why) as cluster:
        cluster.hosts.run(cluster.head, sys.executable, "-c", UPLOAD, str(images))
        yield cluster


def with_two_workers(cluster: RayHosts, cpus: int = 1) -> None:
    """Two that have so many CPUs each, whichever were there or lost before."""
    for number in list(cluster.workers):
        cluster.kill(number)
    wait_for(lambda: read(cluster, COUNT_NODES) == 1)
    for number in (2, 3):
        cluster.add_worker(number, cpus)
    wait_for(lambda: read(cluster, COUNT_NODES) == 3)


UPLOAD = f"""
import pathlib, sys
from gtl.storage import Store
for file in pathlib.Path(sys.argv[1]).iterdir():
    Store("s3://{BUCKET}/images").upload(file, file.name)
"""
COUNT_NODES = """
import ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
answer(sum(node["Alive"] for node in ray.nodes()))
"""
LIST = f"""
from gtl.storage import Store
answer([key for key, _, _ in Store("s3://{BUCKET}").list()])
"""


ANSWER = """
import json
def answer(what):
    print("answer", json.dumps(what), flush=True)
"""


def read(cluster: RayHosts, code: str, **more: str) -> Any:
    """What some code answers, on the head. Ray has its own say there, before and after."""
    address = {"RAY_ADDRESS": f"{cluster.head.address}:{cluster.hosts.ports.gcs}"}
    said = cluster.hosts.run(cluster.head, sys.executable, "-c", ANSWER + code, **address, **more)
    (found,) = re.findall(r"^answer (.*)$", said, re.M)
    return json.loads(found)


def wait_for(what: Callable[[], Any], seconds: float = LONG_S, *, during: Any = None, said: Any = None) -> None:
    """Until something is so, which it has to become before a command ends."""
    begun = time.monotonic()
    while not what():
        if during is not None and during.poll() is not None:
            pytest.fail(f"it ended before: {during.returncode}\n{said()[-6000:]}")
        if time.monotonic() - begun > seconds:
            pytest.fail(f"not within {seconds:g} s\n{said()[-6000:] if said else ''}")
        time.sleep(0.5)


def finish(cluster: RayHosts, run: Any, log: str) -> str:
    """What a command said, which has to end well."""
    run.wait(LONG_S)
    said = cluster.hosts.said(cluster.head, log)
    assert run.returncode == 0, said[-6000:]
    return said


def train(cluster: RayHosts, name: str) -> Any:
    """Start one."""
    recipe = parse_recipe({
        "model": {"source": "builtin:tiny"},
        "tuner": {"type": "lora", "rank": 4},
        "data": {"source": f"s3://{BUCKET}/images", "resolution": 64},
        "train": {"steps": STEPS, "batch_size": 4, "learning_rate": 1e-3, "workers": 2, "gpus_per_worker": 0,
                  "max_failures": 3, "zero": {"stage": 3}, "checkpoints": {"every": EVERY, "keep": 100}},
        "evaluate": {"prompts": []},
        "storage": STORES,
    })  # fmt: skip
    (cluster.head.disk / f"{name}.yaml").write_text(dump_recipe(recipe))
    return cluster.gtl("train", f"{name}.yaml", "--name", name, log=name)


def results(cluster: RayHosts, name: str) -> tuple[list[int], str, dict[int, int]]:
    """Steps that were reported, a digest of the adapter, and the number of workers at each checkpoint."""
    code = f"""
import hashlib, json
from gtl.storage import Store
store = Store("s3://{BUCKET}/runs/{name}")
keys = [key for key, _, _ in store.list()]
lines = [line for key in keys if key.endswith("/metrics.jsonl") for line in store.read(key).decode().splitlines()]
steps = [row["step"] for row in map(json.loads, lines) if "loss" in row]
(adapter,) = [key for key in keys if key.endswith("/adapter/adapter_model.safetensors")]
saved = [json.loads(store.read(key)) for key in keys if "/checkpoints/" in key and key.endswith("/manifest.json")]
digest = hashlib.sha256(store.read(adapter)).hexdigest()
answer([steps, digest, [[one["step"], one["workers"]] for one in saved]])
"""
    steps, digest, saved = read(cluster, code)
    return steps, digest, dict(saved)


def steps_saved(cluster: RayHosts, name: str) -> int:
    return sum(
        f"runs/{name}/" in key and "/checkpoints/" in key and key.endswith("manifest.json")
        for key in read(cluster, LIST)
    )


@pytest.fixture(scope="module")
def undisturbed(cluster: RayHosts) -> str:
    """Digest of the adapter of a run that nothing happens to."""
    with_two_workers(cluster)
    finish(cluster, train(cluster, "straight"), "straight")
    steps, digest, saved = results(cluster, "straight")
    assert steps == list(range(1, STEPS + 1)) and saved == dict.fromkeys(range(EVERY, STEPS + 1, EVERY), 2)
    return digest


def test_a_run_over_two_machines_outlives_one_of_them(cluster: RayHosts, undisturbed: str) -> None:
    with_two_workers(cluster)
    run = train(cluster, "lost")
    wait_for(
        lambda: steps_saved(cluster, "lost") >= 2, during=run, said=lambda: cluster.hosts.said(cluster.head, "lost")
    )
    cluster.kill(next(iter(cluster.workers)))
    time.sleep(5)
    cluster.add_worker(4)
    told = [int(step) for step in re.findall(r"train (\d+)/", finish(cluster, run, "lost"))]
    lost = [before - after for before, after in zip(told, told[1:], strict=False) if after < before]
    assert max(lost, default=0) <= EVERY, "of what was done no more than since the last checkpoint"
    steps, digest, saved = results(cluster, "lost")
    assert steps == list(range(1, STEPS + 1)), "what was done twice is told once"
    assert digest == undisturbed and set(saved.values()) == {2}


def test_a_run_outlives_a_cut_of_the_network(cluster: RayHosts, undisturbed: str) -> None:
    if not cluster.hosts.isolated:
        pytest.skip(f"there is no network to cut: {refusal()}")
    with_two_workers(cluster)
    run = train(cluster, "cut")
    wait_for(lambda: steps_saved(cluster, "cut") >= 2, during=run, said=lambda: cluster.hosts.said(cluster.head, "cut"))
    away = next(iter(cluster.workers.values()))
    cluster.hosts.unplug(away)
    time.sleep(8)
    cluster.hosts.plug(away)
    finish(cluster, run, "cut")
    steps, digest, _ = results(cluster, "cut")
    assert steps == list(range(1, STEPS + 1)) and digest == undisturbed


def image_of(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_study_outlives_a_machine(cluster: RayHosts) -> None:
    """The trial that was on it goes on elsewhere from its last checkpoint; what is finished is not done again."""
    with_two_workers(cluster, 2)
    study = {
        "recipe": {
            "model": {"source": "builtin:tiny"},
            "tuner": {"type": "lora", "rank": 4},
            "data": {"source": f"s3://{BUCKET}/images", "resolution": 64, "validation": 0.25},
            "train": {"steps": STEPS, "batch_size": 4, "workers": 1, "gpus_per_worker": 0,
                      "checkpoints": {"every": EVERY}},
            "evaluate": {"every": 10, "prompts": []},
            "storage": STORES,
        },
        "space": {"train.learning_rate": {"choice": [1e-4, 1e-3, 3e-3, 1e-2]}}, "metric": "val_loss",
        "searcher": {"type": "grid"}, "scheduler": {"type": "fifo"}, "confirm": {"top": 0}, "pack": "off",
    }  # fmt: skip
    (cluster.head.disk / "study.yaml").write_text(json.dumps(study))
    run = cluster.gtl("tune", "study.yaml", log="study")
    done = f"""
from gtl.storage import Store
store = Store("s3://{BUCKET}/runs/study")
answer([key for key, _, _ in store.list() if "/checkpoints/" in key and key.endswith("/manifest.json")])
"""
    wait_for(lambda: len(read(cluster, done)) >= 4, during=run, said=lambda: cluster.hosts.said(cluster.head, "study"))
    cluster.kill(2)
    cluster.add_worker(4, 2)
    said = finish(cluster, run, "study")
    table = f"""
import json
from gtl.storage import Store
store = Store("s3://{BUCKET}/runs/study")
keys = [key for key, _, _ in store.list()]
(file,) = [key for key in keys if key.endswith("study.json")]
rows = {{}}
for key in keys:
    if key.endswith("/metrics.jsonl"):
        lines = store.read(key).decode().splitlines()
        rows[key.split("/trials/")[1].split("/")[0]] = [row["step"] for row in map(json.loads, lines) if "loss" in row]
answer([json.loads(store.read(file))["trials"], rows])
"""
    trials, rows = read(cluster, table)
    assert [one["state"] for one in trials] == ["finished"] * 4 and all(one["metrics"]["val_loss"] for one in trials)
    assert sorted(rows) == [f"{number:05d}" for number in range(4)]
    assert all(steps == list(range(1, STEPS + 1)) for steps in rows.values()), rows
    assert "adapter study@" in said


CLIENT = """
import base64, json, sys, threading, time
import httpx, openai

url, seconds = sys.argv[1], float(sys.argv[2])
tries, drawn, lost = [0], {}, []
lock = threading.Lock()

def count(request):
    with lock:
        tries[0] += 1

client = openai.OpenAI(
    base_url=f"{url}/v1", api_key="none", timeout=120, http_client=httpx.Client(event_hooks={"request": [count]}),
)
for _ in range(600):
    try:
        if httpx.get(f"{url}/readyz", timeout=10).status_code == 200:
            break
    except httpx.TransportError:
        pass
    time.sleep(0.5)
print("ready", flush=True)
end = time.monotonic() + seconds

def use(number):
    while time.monotonic() < end:
        with lock:
            seed = len(drawn) + len(lost) + 1000 * number
        try:
            more = {"seed": seed % 12, "num_inference_steps": 12}
            one = client.images.generate(model="tiny", prompt="a red circle", size="64x64", extra_body=more)
            with lock:
                drawn.setdefault(seed % 12, []).append(one.data[0].b64_json)
                print("drawn", flush=True)
        except openai.OpenAIError as error:
            lost.append(f"{type(error).__name__}: {error}")

threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
answers = sum(map(len, drawn.values()))
print(json.dumps({"drawn": drawn, "lost": lost, "again": tries[0] - answers - len(lost)}))
"""


def test_an_endpoint_on_two_machines_outlives_one_of_them(cluster: RayHosts) -> None:
    """OpenAI's client, which asks again where a connection breaks, gets every picture, and the right one."""
    with_two_workers(cluster)
    port = cluster.hosts.ports.http
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": cluster.head.address, "port": port},
        "applications": [{
            "name": "gtl", "route_prefix": "/", "import_path": "serve.app:build",
            "args": {
                "registry": STORES["registry"], "refresh_s": 3600, "timeout_s": 120, "ingresses": 2,
                "bases": [{"name": "tiny", "source": "builtin:tiny", "replicas": {"min": 2, "max": 2, "cpus": 0.6}}],
            },
        }],
    }  # fmt: skip
    (cluster.head.disk / "serve.yaml").write_text(json.dumps(config))
    address = f"http://{cluster.head.address}:{cluster.hosts.ports.dashboard}"
    cluster.hosts.run(cluster.head, sys.executable, "-m", "ray.serve.scripts", "deploy", "serve.yaml", "-a", address)
    url = f"http://{cluster.head.address}:{port}"
    asking = cluster.hosts.start(cluster.store, sys.executable, "-c", CLIENT, url, "90", log="client")

    def said() -> str:
        return cluster.hosts.said(cluster.store, "client")

    wait_for(lambda: said().count("drawn") > 10, during=asking, said=said)
    assert sorted(Counter(read(cluster, WHERE)).values()) == [1, 1], "a generator on each machine"
    cluster.kill(2)
    before = said().count("drawn")
    cluster.add_worker(4)
    wait_for(lambda: said().count("drawn") > before + 10, during=asking, said=said)
    assert asking.wait(LONG_S) == 0, said()
    result = json.loads(said().splitlines()[-1])
    assert result["lost"] == []
    print(f"{sum(map(len, result['drawn'].values()))} pictures, {result['again']} requests were sent again")
    for seed, pictures in result["drawn"].items():
        assert all(same(image_of(pictures[0]), image_of(one)) for one in pictures), seed
    wait_for(lambda: sorted(Counter(read(cluster, WHERE)).values()) == [1, 1])
    cluster.hosts.run(cluster.head, sys.executable, "-m", "ray.serve.scripts", "shutdown", "-y", "-a", address)


WHERE = """
import ray
from ray.util.state import list_actors
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
alive = list_actors(filters=[("state", "=", "ALIVE")], limit=1000)
answer([one.node_id for one in alive if one.name and "Generator" in one.name])
"""
