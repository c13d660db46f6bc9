import random
from pathlib import Path

import pytest

from gtl.bench.endpoint import Answer, Load, arrivals, bench_endpoint, percentile, summary, table
from gtl.types import UserError, quiet


def test_requests_come_as_a_poisson_process_does() -> None:
    moments = arrivals(50.0, 200.0, random.Random(0))
    gaps = [after - before for before, after in zip(moments, moments[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    # 10,000 are expected, give or take their root; of an exponential distribution mean and deviation are one.
    assert abs(len(moments) - 10_000) < 400 and 0 < moments[0] and moments[-1] < 200
    assert abs(spread / mean - 1) < 0.05


def test_percentiles_are_values_that_were_measured() -> None:
    assert percentile([], 99) is None
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([float(one) for one in range(1, 201)], 99) == 198.0


def test_what_became_of_requests() -> None:
    found = summary([Answer(200, 2.0), Answer(429, 0.1), Answer(200, 4.0), Answer(500, 9.0), Answer(0, 9.0)])
    assert {key: found[key] for key in ("sent", "drawn", "refused", "failed")} == {
        "sent": 5, "drawn": 2, "refused": 1, "failed": 2,
    }  # fmt: skip
    assert found["statuses"] == {"0": 1, "200": 2, "429": 1, "500": 1}
    assert (found["median_s"], found["p99_s"], found["worst_s"], found["refused_p99_s"]) == (3.0, 4.0, 4.0, 0.1)


def test_a_table_says_what_refusing_was_good_for() -> None:
    rows = [{"load": 2.0, **summary([Answer(200, 2.0), Answer(429, 0.1)])}]
    told = {"max_running": 8, "max_waiting": 16, "pictures_per_second": 4.0, "loads": rows, "seconds": 30.0}
    told |= {"model": "tiny", "size": "64x64", "steps": 10, "url": "there", "cores": 2, "users": 16}
    _, _, queue, row = table(told).splitlines()
    assert queue == "its whole queue, 24 pictures, is 6.0 s of work"
    assert row == (
        "2 times: 2 sent, 1 drawn (median 2.00 s, p99 2.00 s), 1 refused with 429 (p99 0.10 s), 0 failed; "
        "taken in without end, the last would wait 30 s"
    )


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (Load(seconds=0), "--seconds: 0: must be above 0"),
        (Load(loads=(1.0, -1.0)), "--load: -1: must be above 0"),
        (Load(users=0), "--users: 0: must be 1 or more"),
        (Load(url="http://127.0.0.1:1"), "--url: no endpoint answers there: "),
    ],
)
def test_what_cannot_work_is_said(load: Load, message: str) -> None:
    with pytest.raises(UserError) as caught:
        bench_endpoint(load, None, quiet)
    assert str(caught.value).startswith(message)


def test_a_file_has_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--json: .*: its folder does not exist"):
        bench_endpoint(Load(), tmp_path / "no" / "file.json", quiet)
