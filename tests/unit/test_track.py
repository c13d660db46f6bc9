"""What a run writes while it goes on: TensorBoard reads back the values of metrics.jsonl; a disk that is full."""

from __future__ import annotations

import os
import threading
import time
import uuid
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gtl.storage import Store
from gtl.train.track import Tracker, read_rows
from gtl.types import UserError

ROWS = [{"step": step, "loss": 1 / step, "learning_rate": 1e-4 * step, "device": "cpu"} for step in range(1, 6)]
LOOK = {"step": 4, "val_loss": 0.3}


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every scalar in a run's TensorBoard folder."""
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def metrics(run: Store) -> dict[str, list[tuple[int, float]]]:
    """The same of its metrics.jsonl; TensorBoard keeps single precision."""
    rows, found = read_rows(run), {}
    for name in ("loss", "learning_rate", "val_loss"):
        found[name] = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
    return found


@pytest.fixture(params=["disk", "bucket"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return Store(tmp_path / "run")
    return Store(request.getfixturevalue("s3")).sub(uuid.uuid4().hex)


def test_tensorboard_has_the_values_of_the_metrics(run: Store, tmp_path: Path) -> None:
    with Tracker(run) as tracker:
        for row in [*ROWS[:4], LOOK, ROWS[4]]:
            tracker.log(row)
    assert read_rows(run) == [*ROWS[:4], LOOK, ROWS[4]]
    for key, _, _ in run.list("tensorboard"):
        run.download(key, tmp_path / "copy" / key)
    found = events(tmp_path / "copy")
    assert found == metrics(run)
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4, 5]


def test_a_resumed_run_has_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Store(tmp_path)
    with Tracker(run) as tracker:
        for row in ROWS:
            tracker.log(row)
    later = time.time() + 60
    monkeypatch.setattr("time.time", lambda: later)  # files of events are named by the second
    with Tracker(run, first_step=3) as tracker:  # steps 4 and 5 are done again
        for row in ROWS[3:]:
            tracker.log({**row, "loss": 9.0})
    losses = [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 9.0), (5, 9.0)]
    assert [(row["step"], row["loss"]) for row in read_rows(run)] == losses
    assert events(tmp_path)["loss"] == metrics(run)["loss"]


@pytest.mark.parametrize("full", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_is_a_line_about_the_run(tmp_path: Path, full: str) -> None:
    said: list[str] = []

    def log() -> None:
        tracker = Tracker(Store(tmp_path))
        open_files = [path for path in Path("/proc/self/fd").iterdir() if path.exists()]
        (number,) = (int(path.name) for path in open_files if path.resolve().is_relative_to(tmp_path / full))
        sink = os.open("/dev/full", os.O_WRONLY)
        os.dup2(sink, number)
        os.close(sink)
        for attempt in (lambda: [tracker.log({"step": step, "loss": 1.0}) for step in range(30)], tracker.close):
            try:
                attempt()
            except UserError as error:
                said.append(str(error))

    thread = threading.Thread(target=log, daemon=True)  # which need not come back, if somebody waits for ever
    thread.start()
    thread.join(20)
    line = f"{tmp_path / 'metrics.jsonl'}: the disk is full; free some space and go on with --resume"
    assert not thread.is_alive()
    assert said == [line] * 2
