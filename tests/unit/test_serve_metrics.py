"""What several ingresses counted, as one text that is scraped."""

import pickle

from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from serve import errors, metrics


def test_every_answer_is_counted_by_its_status_also_a_fault_of_ours() -> None:
    app = FastAPI()
    app.add_middleware(metrics.CountRequests)
    errors.install(app)

    @app.get("/counted/{name}")
    async def counted(name: str) -> str:
        raise {"bug": RuntimeError("a bug"), "mistake": errors.invalid("n", "wrong")}[name]

    client = TestClient(app, raise_server_exceptions=False)
    for path in ("/counted/bug", "/counted/mistake", "/counted/mistake", "/nowhere"):
        client.get(path)
    found = {
        (one.labels["path"], one.labels["status"]): one.value
        for metric in metrics.REQUESTS.collect() for one in metric.samples if one.name == "gtl_requests_total"
    }  # fmt: skip
    assert found["/counted/{name}", "500"] == 1
    assert found["/counted/{name}", "400"] == 2
    assert found["other", "404"] >= 1


def test_the_series_of_all_ingresses_stand_together_in_each_metric() -> None:
    metrics.REQUESTS.labels("/here", "200").inc(3)
    metrics.STEP.labels("tiny").observe(0.3)
    told = [pickle.loads(pickle.dumps(metrics.counted(name))) for name in ("one", "two")]
    read = list(text_string_to_metric_families(metrics.expose(told).decode()))
    assert len({metric.name for metric in read}) == len(read)
    found = {(one.name, one.labels["ingress"]): one for metric in read for one in metric.samples}
    for ingress in ("one", "two"):
        assert found["gtl_pictures_running", ingress].value == 0
        assert found["process_open_fds", ingress].value > 0
    (requests,) = [metric for metric in read if metric.name == "gtl_requests"]
    totals = [one for one in requests.samples if one.labels["path"] == "/here" and one.name == "gtl_requests_total"]
    assert requests.type == "counter" and [(one.labels, one.value) for one in totals] == [
        ({"path": "/here", "status": "200", "ingress": name}, 3.0) for name in ("one", "two")
    ]
    (steps,) = [metric for metric in read if metric.name == "gtl_step_seconds"]
    mine = [one.labels | {"value": one.value} for one in steps.samples if one.labels["ingress"] == "two"]
    buckets = {one["le"]: one["value"] for one in mine if "le" in one}
    assert steps.type == "histogram" and buckets["0.2"] == buckets["0.5"] - 1 == 0
