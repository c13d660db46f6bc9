"""Several ingresses: what one of them knows, all of them tell."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gtl.adapters import Registry
from serve.keys import BURSTS
from tests.endpoint import serving
from tests.ports import free_port

RATE = 120


@pytest.fixture(scope="module")
def pair(ray_cluster: None, shelf: Path) -> Iterator[str]:
    """With a registry that is read again on demand alone."""
    with serving(shelf, free_port(), ingresses=2, requests_per_minute=RATE, refresh_s=3600) as url:
        yield url


def scrape(url: str) -> dict[str, Counter[str]]:
    """Requests for models by the ingress that answered, and the places that are held."""
    metrics = list(text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text))
    names = [metric.name for metric in metrics]
    assert len(names) == len(set(names)), "each metric once, as the format wants it"
    found: dict[str, Counter[str]] = {"models": Counter(), "running": Counter()}
    for metric in metrics:
        for sample in metric.samples:
            if sample.name == "gtl_requests_total" and sample.labels["path"] == "/v1/models":
                found["models"][sample.labels["ingress"]] += int(sample.value)
            elif sample.name == "gtl_pictures_running":
                found["running"][sample.labels["ingress"]] += int(sample.value)
    return found


def test_a_scrape_has_what_each_ingress_counted(pair: str) -> None:
    for _ in range(40):
        assert httpx.get(f"{pair}/v1/models").status_code == 200  # each on a connection of its own
    found = scrape(pair)
    assert len(found["running"]) == 2
    assert set(found["models"]) == set(found["running"]) and sum(found["models"].values()) == 40
    assert [scrape(pair) for _ in range(6)] == [found] * 6, "whichever ingress is asked"


def test_a_refresh_is_for_all(pair: str, shelf: Path) -> None:
    def versions() -> set[str]:
        asked = (httpx.get(f"{pair}/v1/models/tiny:dog@prod", timeout=60) for _ in range(30))
        return {answer.json()["gtl"]["version"] for answer in asked}

    registry = Registry(shelf)
    assert versions() == {"v1"}
    registry.promote("dog@v2", "prod")
    try:
        assert versions() == {"v1"}
        assert httpx.post(f"{pair}/v1/registry/refresh", timeout=60).json()["models"] == 7
        assert versions() == {"v2"}
    finally:
        registry.promote("dog@v1", "prod")
        httpx.post(f"{pair}/v1/registry/refresh", timeout=60)


def test_a_key_s_rate_is_of_all_ingresses_together(pair: str) -> None:
    def post() -> httpx.Response:
        return httpx.post(f"{pair}/v1/images/generations", content=b"{", timeout=120)

    began = time.monotonic()
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda _: post(), range(160)))
    most = RATE / BURSTS + RATE / 60 * (time.monotonic() - began)
    counts = Counter(answer.status_code for answer in answers)
    assert set(counts) == {400, 429} and counts[400] <= math.ceil(most)
    late = next(answer for answer in answers if answer.status_code == 429)
    assert late.json()["error"]["message"].startswith(
        f"more than {RATE // 2} requests a minute with this key at this one of 2 ingresses"
    )
