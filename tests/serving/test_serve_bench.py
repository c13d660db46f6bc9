"""`gtl bench endpoint` on a real one."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from gtl.bench.endpoint import PATH, ROOM, Load, bench_endpoint, endpoint
from gtl.types import quiet
from tests.serving.test_serve import numbers_of
from tests.waiting import eventually


def test_what_is_too_much_for_an_endpoint_is_refused_and_all_else_is_drawn(ray_cluster: None, tmp_path: Path) -> None:
    file = tmp_path / "endpoint.json"
    result = bench_endpoint(Load(steps=4, loads=(0.25, 20.0), seconds=4.0, users=8), file, quiet)
    assert json.loads(file.read_text()) == json.loads(json.dumps(result))
    assert result["model"] == "tiny" and result["pictures_per_second"] > 0
    low, high = result["loads"]
    assert high["requests_per_second"] == 20 * result["pictures_per_second"]
    assert low["failed"] == high["failed"] == 0, (low, high)
    assert low["refused"] == 0 and high["refused"] > 0
    assert high["drawn"] >= ROOM["max_running"] + ROOM["max_waiting"], "what it has room for is not refused"
    for row in (low, high):
        assert row["sent"] == row["drawn"] + row["refused"]


def test_what_is_in_work_at_the_end_is_finished(ray_cluster: None) -> None:
    body = {"prompt": "a red circle", "num_inference_steps": 100}
    with ThreadPoolExecutor(4) as pool:
        with endpoint(Load(), quiet) as url:
            asked = [pool.submit(httpx.post, f"{url}{PATH}", json=body, timeout=120) for _ in range(4)]
            assert eventually(lambda: numbers_of(url)["gtl_pictures_running"] == 4)
            assert not any(one.done() for one in asked)
        assert [one.result().status_code for one in asked] == [200] * 4
