"""TensorBoard's curves of what is scored beside training, from the process that learns of it."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gtl.storage import Store, explained
from gtl.train.scores import read_evaluation, scored
from gtl.train.track import make_event, open_events, start_event

FOLDER = "tensorboard/scores"
"""In a run's folder, and for TensorBoard a run of its own: it follows one file of a folder at a time, and that of the
workers in `tensorboard` goes on."""


class Curves:
    """Writes events of the scores in a run's folder; nothing is there before the first."""

    def __init__(self, run: Store) -> None:
        """Nothing is opened yet."""
        self._run = run
        self._stack = ExitStack()
        self._folder: Path | None = None
        self._events: Any = None
        self._newest = 0
        """Step of the newest event."""

    def add(self, step: int) -> None:
        """Show a look that was scored; where it is not the newest of all, all are shown anew.

        So they are at first, too: an earlier part of the run may have left events of looks that were made again since.

        Raises:
            UserError: the disk is full, or the store fails.
        """
        with explained(self._run.url(FOLDER)):
            if self._events is None:
                self._open()
                steps = scored(self._run)
            elif step <= self._newest:
                self._events.write_event(start_event(0))
                steps = scored(self._run)
            else:
                steps = [step]
            for number in steps:
                self._write(number)
            self._newest = max(steps)
            self._events.flush()
        self._upload()

    def close(self) -> None:
        """Let go of the file."""
        self._stack.close()

    def _open(self) -> None:
        if self._run.is_local:
            self._folder = Path(self._run.url(FOLDER))
        else:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._events = open_events(self._folder, 0)
        self._stack.callback(self._events.close)

    def _write(self, step: int) -> None:
        found = read_evaluation(self._run, step)
        values = {name: score.value for name, score in found.scores.items()}
        self._events.write_event(make_event(step, values, found.created.timestamp()))

    def _upload(self) -> None:
        """A bucket has no append: the local copy replaces the object."""
        if self._run.is_local or self._folder is None:
            return
        for file in self._folder.iterdir():
            self._run.upload(file, f"{FOLDER}/{file.name}")
