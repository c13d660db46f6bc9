"""One process at a time runs a study: on a disk and in a bucket, and after one was killed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gtl.cli import main
from gtl.search import claim
from gtl.search.claim import DRIVER, Driver, beat_of, claimed, read, to_json
from gtl.storage import Store
from gtl.types import UserError, quiet
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from gtl.search import claim
from gtl.storage import Store
from gtl.types import quiet
claim.BEAT_S = 0.05
with claim.claimed(Store(sys.argv[1]), quiet):
    print("claimed", flush=True)
    time.sleep(60)
"""
HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
"""What a shell asks of what it begins in the background."""


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are shorter; which is which stays."""
    for name, seconds in (("BEAT_S", 0.05), ("STALE_S", 3.0), ("SETTLE_S", 0.1)):
        monkeypatch.setattr(claim, name, seconds)


@pytest.fixture(params=["disk", "bucket"])
def studies(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Where a study's versions are."""
    return Store(
        tmp_path / "runs" / "study" if request.param == "disk" else f"{request.getfixturevalue('s3')}/runs/study"
    )


def refusal(studies: Store) -> str:
    with pytest.raises(UserError) as caught:
        with claimed(studies, quiet):
            pytest.fail("two run it")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def elsewhere(studies: Store, **changes: Any) -> Driver:
    """A driver of another machine, whose file is there."""
    driver = replace(Driver("theirs", "other-machine", "", 77, "2026-03-01T12:00:00+00:00"), **changes)
    studies.write(DRIVER, to_json(driver))
    return driver


def test_a_second_one_is_told_who_runs_it(fast: None, studies: Store) -> None:
    with claimed(studies, quiet):
        first = read(studies)
        assert first is not None and (first.pid, first.host) == (os.getpid(), socket.gethostname())
        assert refusal(studies) == (
            f"study {studies.url()}: process {os.getpid()} on {socket.gethostname()} runs it since {first.since}; wait "
            "until it is through, or stop it and --resume; another --name is another study"
        )
        assert eventually(lambda: beat_of(studies, first) not in (None, b"1\n"), 10)
        assert read(studies) == first
    assert [key for key, _, _ in studies.list()] == []
    with claimed(studies, quiet):
        pass
    assert read(studies) is None


def test_what_ends_by_an_error_leaves_nobody(fast: None, studies: Store) -> None:
    with pytest.raises(KeyboardInterrupt), claimed(studies, quiet):
        raise KeyboardInterrupt
    assert read(studies) is None


def hold(folder: Path, begun: str = HEARS) -> subprocess.Popen[str]:
    """Another process that has claimed a study, for a minute."""
    command = [sys.executable, "-c", begun + HOLD, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert holder.stdout is not None and holder.stdout.readline() == "claimed\n"
    return holder


def test_a_killed_one_of_this_machine_is_known_to_be_gone_at_once(tmp_path: Path) -> None:
    studies = Store(tmp_path)
    holder = hold(tmp_path)
    assert re.search(rf"process {holder.pid} on \S+ runs it since", refusal(studies))
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert studies.exists(DRIVER)
    said: list[str] = []
    with claimed(studies, lambda phase, done, total, detail="": said.append(detail)):
        mine = read(studies)
        assert mine is not None and mine.pid == os.getpid()
    assert said == [], "nobody had to wait for a count"


def test_a_second_command_ends_with_one_line_and_status_2(
    fast: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"recipe": {"model": {"source": "nowhere"}, "data": {"source": "nowhere"},
                         "storage": {"runs": str(tmp_path / "runs")}},
              "space": {"train.learning_rate": {"choice": [1e-3, 1e-4]}}, "metric": "kid"}  # fmt: skip
    (tmp_path / "rates.yaml").write_text(json.dumps(values))
    with claimed(Store(tmp_path / "runs" / "rates"), quiet):
        for more in ([], ["--resume"]):
            monkeypatch.setattr(sys, "argv", ["gtl", "tune", str(tmp_path / "rates.yaml"), *more])
            with pytest.raises(SystemExit) as end:
                main()
            last = capsys.readouterr().err.splitlines()[-1]
            assert end.value.code == 2
            assert last.startswith(f"error: study {tmp_path}/runs/rates: process {os.getpid()} on ")


def test_of_another_machine_it_is_seen_whether_it_counts(fast: None, studies: Store) -> None:
    theirs = elsewhere(studies)
    through = threading.Event()
    counting = threading.Thread(target=claim.count, args=(studies, theirs, through))
    counting.start()
    try:
        assert refusal(studies).startswith(
            f"study {studies.url()}: process 77 on other-machine runs it since 2026-03-01T12:00:00+00:00; "
        )
    finally:
        through.set()
        counting.join()
    said: list[str] = []
    with claimed(studies, lambda phase, done, total, detail="": said.append(f"{phase}: {detail}")):
        mine = read(studies)
        assert mine is not None and mine.pid == os.getpid()
    assert said == ["study: does process 77 on other-machine still run it, since 2026-03-01T12:00:00+00:00?"]
    assert [key for key, _, _ in studies.list()] == []


def test_a_container_with_the_same_name_is_another_machine(fast: None, tmp_path: Path) -> None:
    """Its processes have numbers of their own, of which none here says anything."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    here = Driver("t", socket.gethostname(), claim.processes(), gone.pid, "now")
    assert here.is_gone and not replace(here, processes="pid:[1]").is_gone and not replace(here, host="x").is_gone
    assert not replace(here, pid=1).is_gone, "it is root's, or ours, and there"


def test_of_two_that_come_at_once_one_runs_it(fast: None, studies: Store) -> None:
    """Both find the file of one that is dead."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    elsewhere(studies, host=socket.gethostname(), processes=claim.processes(), pid=gone.pid)
    won: list[int] = []
    lost: list[str] = []
    start, end = threading.Barrier(4), threading.Event()

    def come(number: int) -> None:
        start.wait()
        try:
            with claimed(studies, quiet):
                won.append(number)
                end.wait(20)
        except UserError as error:
            lost.append(str(error))
        if len(lost) == 3:
            end.set()

    threads = [threading.Thread(target=come, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 3)
    assert [key for key, _, _ in studies.list()] == []


@pytest.mark.parametrize(("begun", "end"), [(HEARS, signal.SIGINT), (DEAF, signal.SIGTERM)], ids=["in front", "behind"])
def test_who_lost_a_study_while_asleep_is_interrupted(tmp_path: Path, begun: str, end: int) -> None:
    """Also where a shell began it in the background, with interrupts ignored."""
    studies = Store(tmp_path)
    holder = hold(tmp_path, begun)
    theirs = elsewhere(studies)
    _, said = holder.communicate(timeout=60)
    assert holder.returncode == -end and ("KeyboardInterrupt" in said) is (end == signal.SIGINT)
    assert read(studies) == theirs, "it is theirs, and stays"
