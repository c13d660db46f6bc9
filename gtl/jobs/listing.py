"""Jobs as rows."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gtl.jobs.client import ATTEMPT, COMMAND
from gtl.report.text import columns

if TYPE_CHECKING:
    from ray.job_submission import JobDetails


def rows(jobs: Iterable[JobDetails]) -> list[dict[str, Any]]:
    """What there is to know of jobs: nothing of their environments is among it."""
    found = []
    for job in jobs:
        told = job.metadata or {}
        found.append({
            "job": job.submission_id, "status": str(job.status), "command": told.get(COMMAND, ""),
            "attempt": int(told.get(ATTEMPT, 1)), "started": when(job.start_time), "ended": when(job.end_time),
            "exit_status": job.driver_exit_code,
        })  # fmt: skip
    return found


def when(milliseconds: int | None) -> str | None:
    """A time in UTC, to the second."""
    if not milliseconds:
        return None
    moment = datetime.datetime.fromtimestamp(milliseconds // 1000, datetime.timezone.utc)
    return moment.isoformat().replace("+00:00", "Z")


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Rows for people; nothing of none."""
    cells = [
        (row["job"], row["status"].lower(), row["started"] or "", "" if row["exit_status"] is None else
         f"exit {row['exit_status']}", row["command"])
        for row in found
    ]  # fmt: skip
    return columns(cells) if cells else "no jobs"
