"""Everything at once, for long: no request is lost, no picture is wrong, and nothing grows."""

import asyncio
import math
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ImageOps

from gtl.adapters import Registry
from gtl.config.names import parse_reference
from gtl.families import open_family
from gtl.generate.edit import Edit
from gtl.generate.images import generate
from gtl.generate.request import Request
from tests.endpoint import BASE, replicas_of, serving
from tests.ports import free_port
from tests.serving.test_serve import numbers_of, same
from tests.traffic import Shown, Traffic
from tests.waiting import eventually

USERS = 6
SAMPLE_S = 2.0
SPARE = {"bytes": 40 * 2**20, "threads": 8, "files": 8}
"""What a process may gain: allocators do not give back all that they are given, threads and files come and go."""
SETTLED_S = 300.0
"""A replica that came later and lived for less is not judged by how it grew, since it loads and fills what it keeps for
as long as there is something it was not asked for yet, but by where it ended: where those are that lived for longer."""
WARM_S = 25
"""Before it is looked at, a replica is asked for as much as when it is the only one: half of all users are its own."""


@pytest.mark.parametrize(
    ("seconds", "kill_s", "checked"), [(40, 15, 12), pytest.param(1800, 120, 400, marks=pytest.mark.soak)]
)
def test_everything_at_once(ray_cluster: None, shelf: Path, seconds: float, kill_s: float, checked: int) -> None:
    replicas = {"min": 2, "max": 2, "cpus": 0.5}
    bases = [{"name": "tiny", "source": BASE, "slots": 3, "max_rank": 8, "host_gib": 0.001, "replicas": replicas}]
    with serving(shelf, free_port(), bases=bases) as url:
        traffic = Traffic(url, Registry(shelf), keep=min(1.0, checked / seconds))
        asyncio.run(traffic.run(WARM_S, 2 * USERS))
        with observed() as vitals:
            with killing(kill_s) as killed:
                asyncio.run(traffic.run(seconds, USERS))
            still = eventually(lambda: idle(url), 120)  # the one that was killed last has to come up first
        print(dict(traffic.asked), f"replicas killed: {len(killed)}, pictures kept: {len(traffic.shown)}")
        for name, series in vitals.items():
            grown = [growth(series, of) for of in SPARE]
            print(f"{name}: {series[0]} to {series[-1]} in {len(series)} looks, grew by {grown}")
        assert traffic.faults == []
        assert killed, "or the test shows nothing of it"
        assert still, "nobody asks, and yet something is in work"
        assert outgrown(vitals) == []
        wrong = [one.fields for one in traffic.shown[:checked] if not same(one.image, alone(shelf, one))]
        assert wrong == []
    assert len(traffic.shown) > checked // 4


def idle(url: str) -> bool:
    """Whether nothing is in work, in ingresses and generators."""
    import ray

    told = numbers_of(url)
    try:
        busy = [ray.get(one.record_routing_stats.remote())["busy_s"] for one in replicas_of("Generator")]
    except ray.exceptions.RayError:  # one is not up yet
        return False
    return told["gtl_pictures_running"] == told["gtl_pictures_waiting"] == 0 and len(busy) == 2 and not any(busy)


@contextmanager
def observed() -> Iterator[dict[str, list[dict[str, float]]]]:
    """Memory, threads and open files of every replica, by its process, sampled until the block ends."""
    vitals: dict[str, list[dict[str, float]]] = defaultdict(list)
    over = threading.Event()

    def look() -> None:
        while not over.wait(SAMPLE_S):
            for kind in ("Ingress", "Generator"):
                for pid, one in measured(kind):
                    vitals[f"{kind} {pid}"].append({"second": time.monotonic() - began, **one})

    began = time.monotonic()
    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield vitals
    finally:
        over.set()
        thread.join()


def measured(kind: str) -> list[tuple[int, dict[str, float]]]:
    """Of each replica that is there, its process and how it is."""
    import ray

    def look(_: Any) -> tuple[int, dict[str, float]]:
        import ctypes
        import gc
        import os

        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        threads, files = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
        return os.getpid(), {"bytes": pages * os.sysconf("SC_PAGE_SIZE"), "threads": threads, "files": files}

    found = []
    for one in replicas_of(kind):
        try:
            found.append(ray.get(one.__ray_call__.remote(look), timeout=20))
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):  # killed, or not up yet
            continue
    return found


def outgrown(vitals: dict[str, list[dict[str, float]]]) -> list[str]:
    """Processes that gained more than they may, and of what."""
    found = []
    for of, spare in SPARE.items():
        ends = [one[-1][of] for name, one in vitals.items() if name.startswith("Generator") and lived(one) >= SETTLED_S]
        for name, series in vitals.items():
            if series[0]["second"] < 3 * SAMPLE_S or lived(series) >= SETTLED_S:
                if (gained := growth(series, of)) > spare:
                    found.append(f"{name}: gained {gained:.0f} {of}: {series}")
            elif series[-1][of] > max(ends, default=math.inf) + spare:
                found.append(f"{name}: ended at {series[-1][of]:.0f} {of}, others at {ends}: {series}")
    return found


def lived(series: list[dict[str, float]]) -> float:
    """Seconds."""
    return series[-1]["second"] - series[0]["second"]


def growth(series: list[dict[str, float]], of: str) -> float:
    """What a straight line through a series gains after its first third; 0 of one that was too short-lived to say."""
    later = series[len(series) // 3 :]
    if len(later) < 5:
        return 0.0
    seconds = np.array([one["second"] for one in later])
    slope, _ = np.polyfit(seconds, [one[of] for one in later], 1)
    return float(slope * (seconds[-1] - seconds[0]))


def test_what_grows_is_found() -> None:
    """A process that leaks, one that was started late and is no larger than the others, and one that is."""

    def series(begin: float, end: float, first: float, last: float) -> list[dict[str, float]]:
        seconds = np.linspace(begin, end, 20)
        return [{"second": x, "bytes": y * 2**20, "threads": 40, "files": 60} for x, y in
                zip(seconds, np.linspace(first, last, 20), strict=True)]  # fmt: skip

    vitals = {
        "Generator 1": series(0, 1000, 750, 770), "Generator 2": series(0, 1000, 750, 820),
        "Generator 3": series(800, 1000, 220, 790), "Generator 4": series(800, 1000, 220, 870),
        "Ingress 5": series(0, 1000, 200, 210),
    }  # fmt: skip
    assert [one.split(": ")[0] for one in outgrown(vitals)] == ["Generator 2", "Generator 4"]


@contextmanager
def killing(period: float) -> Iterator[list[Any]]:
    """Kill a generator now and then, when there are two, until the block ends."""
    import ray

    over, killed, chance = threading.Event(), [], random.Random(0)

    def kill() -> None:
        while not over.wait(period):
            if len(there := measured("Generator")) == 2:
                killed.append(there)
                ray.kill(chance.choice(replicas_of("Generator")))

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def alone(shelf: Path, one: Shown) -> Any:
    """The same request, drawn by itself."""
    registry, fields, family = Registry(shelf), one.fields, open_family(BASE)
    adapters = []
    for reference in filter(None, one.model.partition(":")[2].split("+")):
        scale = parse_reference(reference).scale
        adapters.append((registry.fetch(reference), 1.0 if scale is None else scale))
    wide, high = map(int, fields["size"].split("x"))
    request = Request(
        fields["prompt"], high, wide, fields.get("negative_prompt", ""), fields["seed"],
        fields["num_inference_steps"], fields["guidance_scale"],
    )  # fmt: skip
    mask = None if one.mask is None else ImageOps.invert(one.mask.getchannel("A"))
    edit = None if one.edited is None else Edit(one.edited, mask, fields["strength"])
    ((_, image),) = generate(family, [request], adapters, edit=edit)
    return image
