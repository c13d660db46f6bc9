"""What a run writes while it goes on: metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from gtl.storage import Store

Row = Mapping[str, float | int | str | None]


class Tracker:
    """Writes rows of metrics into a run's folder; one process of a run has one.

    On a local disk every row is there at once. A bucket has no append: rows go to a local copy, which replaces the
    object at each `flush`.
    """

    def __init__(self, run: Store, first_step: int = 0) -> None:
        """Keep the rows before `first_step` of an earlier part of the same run, drop what it will do again."""
        from tensorboardX import SummaryWriter

        self._run = run
        self._temporary = None if run.is_local else tempfile.TemporaryDirectory()
        self._folder = Path(self._temporary.name if self._temporary else run.url())
        self._folder.mkdir(parents=True, exist_ok=True)
        rows = [row for row in read_rows(run) if int(row.get("step") or 0) <= first_step] if first_step else []
        Store(self._folder).write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file = (self._folder / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._events = SummaryWriter(str(self._folder / "tensorboard"), purge_step=first_step + 1, flush_secs=10)

    def log(self, row: Row) -> None:
        """Append one row; it names its step."""
        self._file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                self._events.add_scalar(name, value, int(row["step"]))  # type: ignore[arg-type]

    def flush(self) -> None:
        """Make what was logged visible to others."""
        self._file.flush()
        self._events.flush()
        if self._temporary:
            for file in sorted(self._folder.rglob("*")):
                if file.is_file():
                    self._run.upload(file, str(file.relative_to(self._folder)))

    def close(self) -> None:
        """Flush and let go of the files."""
        self._events.close()
        self.flush()
        self._file.close()
        if self._temporary:
            self._temporary.cleanup()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_rows(run: Store) -> list[dict[str, float | int | str | None]]:
    """A run's rows so far; a last line that was cut off is left out."""
    if not run.exists("metrics.jsonl"):
        return []
    rows = []
    for line in run.read("metrics.jsonl").decode().splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows
