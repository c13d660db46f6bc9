"""What a run writes while it goes on: metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from gtl.storage import Store, explained

Row = Mapping[str, float | int | str | None]


class Tracker:
    """Writes rows of metrics into a run's folder; one process of a run has one.

    On a local disk every row is there at once. A bucket has no append: rows go to a local copy, which replaces the
    object at each `flush`. Every method raises UserError, naming the rows' file, when the disk is full.
    """

    def __init__(self, run: Store, first_step: int = 0) -> None:
        """Keep the rows before `first_step` of an earlier part of the same run, drop what it will do again."""
        self._run = run
        self._temporary = None if run.is_local else tempfile.TemporaryDirectory()
        self._folder = Path(self._temporary.name if self._temporary else run.url())
        rows = [row for row in read_rows(run) if int(row.get("step") or 0) <= first_step] if first_step else []
        Store(self._folder).write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._place = str(self._folder / "metrics.jsonl")
        with explained(self._place):
            self._file = open(self._place, "a", encoding="utf-8", buffering=1)
            self._events = open_events(self._folder / "tensorboard", first_step + 1)

    def log(self, row: Row) -> None:
        """Append one row; it names its step."""
        numbers = {name: value for name, value in row.items() if name != "step" and isinstance(value, (int, float))}
        event = make_event(int(row["step"]), numbers, time.time())  # type: ignore[arg-type]
        with explained(self._place):
            self._file.write(json.dumps(row) + "\n")
            self._events.write_event(event)
            self._events.flush()

    def flush(self) -> None:
        """Make what was logged visible to others."""
        if self._temporary:
            for file in sorted(self._folder.rglob("*")):
                if file.is_file():
                    self._run.upload(file, str(file.relative_to(self._folder)))

    def close(self) -> None:
        """Flush and let go of the files."""
        with explained(self._place), ExitStack() as stack:
            if self._temporary:
                stack.callback(self._temporary.cleanup)
            stack.callback(self._file.close)
            stack.callback(self._events.close)
            self.flush()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_events(folder: Path, first_step: int) -> Any:
    """A new file of TensorBoard events in a folder; it hides what older files there have from `first_step` on.

    Not a `SummaryWriter`: its thread dies of a full disk, unseen, and the next event waits for it for ever.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event

    folder.mkdir(parents=True, exist_ok=True)
    events = EventsWriter(str(folder / "events"))
    events.write_event(Event(step=first_step, file_version="brain.Event:2"))
    events.write_event(start_event(first_step))
    return events


def start_event(first_step: int) -> Any:
    """A TensorBoard event that hides what stands before it of steps from `first_step` on."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    return Event(step=first_step, session_log=SessionLog(status=SessionLog.START))


def make_event(step: int, numbers: Mapping[str, float], when: float) -> Any:
    """A TensorBoard event of what was measured after a step; `when` in seconds since 1970."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
    return Event(wall_time=when, step=step, summary=Summary(value=values))


def write_hparams(run: Store, config: Mapping[str, Any], metrics: Sequence[str]) -> None:
    """Tell TensorBoard's page of hyperparameters what a run was, and which of its numbers it is judged by."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import hparams

    told = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in config.items()}
    with tempfile.TemporaryDirectory() as folder:
        events = EventsWriter(str(Path(folder, "events")))
        for summary in hparams(told, dict.fromkeys(metrics, 0.0)):
            events.write_event(Event(step=0, summary=summary))
        events.close()
        (file,) = Path(folder).iterdir()
        run.write("tensorboard/events.out.tfevents.hparams", file.read_bytes())


def read_rows(run: Store) -> list[dict[str, float | int | str | None]]:
    """A run's rows so far; a last line that was cut off is left out."""
    if not run.exists("metrics.jsonl"):
        return []
    rows = []
    for line in run.read("metrics.jsonl").decode().splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows
