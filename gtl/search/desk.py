"""What a study's trials ask while they run: whether the study is to end, and whether another process is that trial."""

from __future__ import annotations

from gtl.train.board import Board


class Desk(Board):
    """The board of a study, where a trial's process enters before it touches the trial's run, and leaves at last.

    Ray Tune starts the next process of a trial that it paused before the last one has saved.
    """

    def __init__(self) -> None:
        super().__init__()
        self._inside: set[int] = set()

    def enter(self, number: int) -> bool:
        """Whether nobody is a trial, who then is the caller."""
        is_free = number not in self._inside
        self._inside.add(number)
        return is_free

    def leave(self, number: int) -> None:
        """Nobody is a trial any more."""
        self._inside.discard(number)
