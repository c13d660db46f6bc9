"""What a run writes while it goes on, read back, and on a disk that is full."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gtl.storage import Store
from gtl.train.track import Tracker, read_rows
from gtl.types import UserError


def test_a_resumed_run_goes_on_in_the_same_curves(tmp_path: Path) -> None:
    run = Store(tmp_path)
    with Tracker(run) as tracker:
        for step in (1, 2, 3):
            tracker.log({"step": step, "loss": 1 / step, "device": "cpu"})
    time.sleep(1.1)  # files of events are named by the second
    with Tracker(run, first_step=2) as tracker:
        tracker.log({"step": 3, "loss": 8.0, "val_loss": 4.0})
        assert [row["loss"] for row in read_rows(run)] == [1.0, 0.5, 8.0]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 8.0)]
    assert [(event.step, event.value) for event in events.Scalars("val_loss")] == [(3, 4.0)]


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
