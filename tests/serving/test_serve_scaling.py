"""Generators come with the work and go with it, to none and back."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.order import Order
from serve.routing import LOAD_S, STATS_S, seconds
from serve.scaling import ByWork
from tests.endpoint import BASE, deploy, replicas_of, serving
from tests.ports import free_port
from tests.serving.test_serve import load_of, numbers_of, picture_of
from tests.waiting import eventually


def test_replicas_follow_the_work(ray_cluster: None, shelf: Path) -> None:
    replicas = {"min": 0, "max": 2, "target_s": 2.0, "down_after_s": 2.0, "to_zero_after_s": 4.0, "cpus": 0.5}
    bases = [{"name": "tiny", "source": BASE, "slots": 4, "max_rank": 8, "replicas": replicas}]
    with serving(shelf, free_port(), bases=bases) as url:
        assert httpx.get(f"{url}/v1/models").status_code == 200
        assert replicas_of("Generator") == [], "nobody asked yet"

        def ask(seed: int, steps: int) -> int:
            fields = {"prompt": "a red circle", "seed": seed, "num_inference_steps": steps}
            return httpx.post(f"{url}/v1/images/generations", json=fields, timeout=120).status_code

        assert ask(1, 2) == 200, "who asks first waits until there is one"
        with ThreadPoolExecutor(32) as pool:
            answers = [pool.submit(ask, seed, 150) for seed in range(32)]
            assert eventually(lambda: len(replicas_of("Generator")) == 2, 60), (
                "32 pictures of 150 steps are more than 2 s of work"
            )
            assert {answer.result() for answer in answers} == {200}, "and none is lost while they come and go"
        began = time.monotonic()
        assert eventually(lambda: replicas_of("Generator") == [], 90)
        assert time.monotonic() - began > 2.0
        assert ask(1, 2) == 200, "and back"


def test_another_config_takes_over_and_no_request_fails(ray_cluster: None, shelf: Path) -> None:
    """Those in work are finished by what they began with, those who come later find the new one."""
    bases = [{"name": "tiny", "source": BASE, "steps": 120}]
    with serving(shelf, free_port(), bases=bases) as url, ThreadPoolExecutor(4) as pool:
        over = threading.Event()

        def keep_asking(seed: int) -> list[int]:
            found = []
            while not over.is_set():
                fields = {"prompt": "a red circle", "seed": seed}
                found.append(httpx.post(f"{url}/v1/images/generations", json=fields, timeout=120).status_code)
            return found

        asking = [pool.submit(keep_asking, seed) for seed in range(3)]
        assert eventually(lambda: load_of()[1] > 0)
        deploy(shelf, bases=[{**bases[0], "steps": 3}])
        time.sleep(2)
        over.set()
        answers = [status for one in asking for status in one.result()]
        assert set(answers) == {200} and len(answers) >= 6
        drawn = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a red circle"}, timeout=60).json()
        assert json.loads(picture_of(drawn["data"][0]["b64_json"]).info["gtl"])["steps"] == 3


def test_an_adapter_stays_where_it_is_until_everybody_wants_it(ray_cluster: None, shelf: Path) -> None:
    replicas = {"min": 2, "max": 2, "cpus": 0.5}
    bases = [{"name": "tiny", "source": BASE, "slots": 4, "max_rank": 8, "max_batch": 2, "replicas": replicas}]
    with serving(shelf, free_port(), bases=bases) as url:

        def ask(seed: int, steps: int) -> int:
            fields = {"prompt": "a red circle", "model": "tiny:dog", "seed": seed, "num_inference_steps": steps}
            return httpx.post(f"{url}/v1/images/generations", json=fields, timeout=120).status_code

        for seed in range(4):
            assert ask(seed, 2) == 200
            time.sleep(1.5 * STATS_S)
        assert sorted(holders()) == [0, 1], "asked one after the other, one replica is enough"
        with ThreadPoolExecutor(24) as pool:
            assert set(pool.map(lambda seed: ask(seed, 80), range(24))) == {200}
        assert holders() == [1, 1], "asked by many, both have it"


def holders() -> list[int]:
    """Of each replica, how many adapters it has in slots."""
    import ray

    found = []
    for one in replicas_of("Generator"):
        told = ray.get(one.record_routing_stats.remote())
        found.append(len(told["adapters"]))
    return found


def test_seconds_until_a_replica_could_begin() -> None:
    order = Order("x", "", 1, 10, 7.5, None, (("dog@v1", 1.0),))
    assert seconds({}, 0.0, None) == 0.0
    assert seconds({}, 0.0, order) == LOAD_S
    assert seconds({"busy_s": 2.0, "adapters": ["dog@v1"]}, 1.0, order) == 3.0
    assert seconds({"busy_s": 2.0, "adapters": ["cat@v1"]}, 0.0, order) == 2.0 + LOAD_S


@pytest.mark.parametrize(
    ("busy", "requests", "number"),
    [({}, 0, 0), ({}, 3, 1), ({"a": 9.0}, 3, 1), ({"a": 9.0, "b": 2.0}, 3, 2), ({"a": 500.0}, 3, 4)],
    ids=["idle", "asked of none", "within the target", "the sum counts", "as many as allowed"],
)
def test_the_number_is_that_of_the_work(busy: dict[str, float], requests: int, number: int) -> None:
    class Context:
        aggregated_metrics: Any = {"busy_s": busy}
        total_num_requests = requests
        capacity_adjusted_min_replicas, capacity_adjusted_max_replicas = 0, 4

    assert ByWork(10.0)(Context())[0] == number  # type: ignore[arg-type]


def test_a_generator_that_is_busy_is_ready(ray_cluster: None, shelf: Path) -> None:
    """It is asked whether it is there behind all that it draws, for longer than anybody waits for that."""
    base = {"name": "tiny", "source": BASE, "max_batch": 1}
    body = {"prompt": "a red circle", "num_inference_steps": 120}
    with serving(shelf, free_port(), bases=[base], timeout_s=600) as url, ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(httpx.post, f"{url}/v1/images/generations", json=body, timeout=600) for _ in range(16)]
        assert eventually(lambda: numbers_of(url)["gtl_pictures_running"] == 16)
        answer = httpx.get(f"{url}/readyz", timeout=60)
        assert (answer.status_code, answer.json()) == (200, {"status": "ready", "missing": []})
        assert not all(one.done() for one in asked), "or it was not busy"
        assert [one.result().status_code for one in asked] == [200] * 16
