"""What the end of a job means: a pure function of the state that Ray reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gtl.jobs.inside import LOST

Meaning = Literal["done", "mistake", "lost", "stopped", "failed"]


@dataclass(frozen=True)
class End:
    """What Ray says of a job that is over."""

    status: str
    """SUCCEEDED, FAILED or STOPPED."""
    exit_code: int | None = None
    """Of the command; None if Ray did not see it end."""
    error_type: str | None = None
    """Ray's JobErrorType, if any."""


def meaning(end: End) -> Meaning:
    """Whose doing the end was.

    The cluster's (lost): no command was seen to end, since the node or the actor above it died or never came; a signal
    ended it (137: SIGKILL, as by the kernel for want of memory; 130 and 143: it saved and stopped, as before a machine
    is taken away), and nobody stopped the job; or LOST. The user's (mistake): 2. Everything else, such as 1, the
    command would meet again; runs have a number of failures of their own that they survive (train.max_failures).
    """
    if end.status == "SUCCEEDED":
        return "done"
    if end.status == "STOPPED":
        return "stopped"
    if end.exit_code is None:
        return "lost"
    if end.exit_code == 2:
        return "mistake"
    by_signal = end.exit_code < 0 or end.exit_code > 128
    return "lost" if by_signal or end.exit_code == LOST else "failed"


def is_tried_again(end: End, left: int) -> bool:
    """Whether the follower submits the same once more.

    Args:
        end: Of the attempt.
        left: Further attempts that it may make.
    """
    return left > 0 and meaning(end) == "lost"


def exit_status(end: End) -> int:
    """Of `gtl submit --follow`: 0 done, 2 a mistake of the user's, 1 anything else."""
    return {"done": 0, "mistake": 2}.get(meaning(end), 1)
