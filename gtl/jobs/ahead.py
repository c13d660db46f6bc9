"""The checks that only the cluster can make: a job of their own makes them before the job that they are for is sent."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from gtl.jobs.client import ENDED, answered
from gtl.jobs.parcel import Parcel, begin
from gtl.types import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

LOOK_S = 0.3
"""Between two looks at the job."""
LIMIT_S = 600.0
"""That it may take: a place of which a node does not answer is given up after two minutes."""
MISTAKE = "error: "
"""How a line begins that says what is wrong."""


def check_there(client: JobSubmissionClient, parcel: Parcel, key: str | None, say: Callable[[str], None]) -> None:
    """Compare versions of gtl, and write, read and remove an object in each store, on the cluster as it is now.

    The job has the parcel's files and its environment. Ray's own list keeps it, `gtl jobs list` does not name it.

    Args:
        client: Of the cluster.
        parcel: What would be sent.
        key: Of its secrets there, which a store may need.
        say: Takes what is done.

    Raises:
        UserError: a check fails, or the cluster makes none.
    """
    job = f"gtl-check-{uuid.uuid4().hex[:12]}"
    say(f"checking on the cluster: its gtl, {', '.join(parcel.writes)}")
    begin(client, parcel, job, key, only_checks=True)
    address = client.get_address()
    try:
        with answered(address):
            info = until_ended(client, job)
            said = client.get_job_logs(job) if info.driver_exit_code else ""
    except BaseException:
        with suppress(RuntimeError, OSError):
            client.stop_job(job)
        raise
    if info.driver_exit_code == 0:
        return
    mistakes = [line for line in said.splitlines() if line.startswith(MISTAKE)]
    if info.driver_exit_code == 2 and mistakes:
        raise UserError(mistakes[-1].removeprefix(MISTAKE))
    told = said.split("\n") if info.driver_exit_code is not None else (info.message or "").split("\n")
    reason = next((line.strip() for line in reversed(told) if line.strip()), str(info.status))[:300]
    raise UserError(f"--address {address}: the cluster did not get through the checks before the job: {reason}")


def until_ended(client: JobSubmissionClient, job: str) -> JobDetails:
    """What Ray says of a job once it is over.

    Raises:
        UserError: it is not after LIMIT_S.
    """
    begun = time.monotonic()
    while str((info := client.get_job_info(job)).status) not in ENDED:
        if time.monotonic() - begun > LIMIT_S:
            raise UserError(
                f"--address {client.get_address()}: the checks before the job are {str(info.status).lower()} after "
                f"{LIMIT_S:.0f} s; is there room for a process on the head?"
            )
        time.sleep(LOOK_S)
    return info
