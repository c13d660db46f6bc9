"""Following a job: its output as it comes, another attempt when the cluster lost it, and what came of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, TextIO

from gtl.jobs.client import ENDED, wipe_secrets
from gtl.jobs.parcel import Parcel, laid
from gtl.jobs.resume import stamp
from gtl.jobs.submit import Sent, send
from gtl.jobs.verdict import End, exit_status, is_tried_again, meaning

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

SILENCE_S = 20.0
"""Without output the job is asked after: a connection that was cut off in between says nothing either."""
PATIENCE_S = 180.0
"""That the dashboard may be away, as when its pod moves."""
PAUSE_S = 5.0
"""Before another attempt, in which Ray notices what else went with the one that was lost."""
NOISE = ("Running entrypoint for job ", "Runtime env is setting up.")
"""Of Ray's own lines, before the command's."""

Say = Callable[[str], None]


class Away(Exception):
    """The cluster no longer answers: no mistake of the user's, and not known to be the end of the job."""


class Output:
    """A job's output, line by line, and what of it names results."""

    def __init__(self, out: TextIO) -> None:
        """Print to a stream."""
        self.results: dict[str, None] = {}
        """Lines that name what came of it, in their order."""
        self.last = ""
        self._out = out
        self._rest = ""

    def __call__(self, text: str) -> None:
        """Take in the next piece, which may end within a line."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._print(line)

    def flush(self) -> None:
        """Print what has no end of line."""
        if self._rest:
            self._print(self._rest)
        self._rest = ""

    def close(self) -> None:
        """Print what is left, and once more the results, if something came after them."""
        self.flush()
        if self.results and self.last != next(reversed(self.results)):
            print(*self.results, sep="\n", file=self._out, flush=True)

    def _print(self, line: str) -> None:
        if any(noise in line for noise in NOISE):
            return
        print(line, file=self._out, flush=True)
        if line.startswith(("report ", "adapter ")):
            self.results[line] = None
        self.last = line or self.last


def follow(client: JobSubmissionClient, job: str, show: Callable[[str], None]) -> JobDetails:
    """Show a job's output until it is over; returns what Ray says of it.

    Raises:
        Away: the cluster does not answer for too long.
        KeyboardInterrupt: the user has seen enough.
    """
    return asyncio.run(stream(client, job, show))


async def stream(client: JobSubmissionClient, job: str, show: Callable[[str], None]) -> JobDetails:
    """`follow`, also through connections that end before the job: what was shown is not shown again."""
    from aiohttp import ClientError

    shown = 0
    away_since: float | None = None
    while True:
        try:
            seen = 0
            async for text in pieces(client, job):
                seen += len(text)
                if seen > shown:
                    show(text[shown - seen :])
                    shown = seen
            info = client.get_job_info(job)
            away_since = None
            if str(info.status) in ENDED:
                show(rest_of(client, job, shown))
                return info
        except (ClientError, OSError, RuntimeError) as error:
            away_since = away_since or time.monotonic()
            if time.monotonic() - away_since > PATIENCE_S:
                raise Away(
                    f"{client.get_address()} has not answered for {PATIENCE_S:.0f} s "
                    f"({' '.join(str(error).split())[:200]}); if it comes back, the same command follows again"
                ) from error
        await asyncio.sleep(1)


async def pieces(client: JobSubmissionClient, job: str) -> AsyncIterator[str]:
    """A job's output from its beginning, until the connection ends or the job is over and silent."""
    output = client.tail_job_logs(job)
    following: asyncio.Future[str] = asyncio.ensure_future(anext(output))
    try:
        while True:
            done, _ = await asyncio.wait({following}, timeout=SILENCE_S)
            if done:
                try:
                    yield following.result()
                except StopAsyncIteration:
                    return
                following = asyncio.ensure_future(anext(output))
            elif str(client.get_job_info(job).status) in ENDED:
                return
    finally:
        following.cancel()


def rest_of(client: JobSubmissionClient, job: str, shown: int) -> str:
    """What was not shown of a finished job's output; nothing, if its node is gone and the output with it."""
    try:
        return client.get_job_logs(job)[shown:]
    except RuntimeError:
        return ""


def see_through(
    client: JobSubmissionClient, parcel: Parcel, sent: Sent, retries: int, show: Output, say: Say
) -> int:  # fmt: skip
    """Follow a job to its end, and the attempts that it takes; returns the exit status of following.

    Args:
        client: Of the cluster.
        parcel: What was sent, to be sent again.
        sent: The attempt that goes on now.
        retries: Further attempts at most.
        show: Takes the output.
        say: Takes what there is to say about it.

    Raises:
        Away: the cluster does not answer for too long.
        UserError: it takes no further attempt.
        KeyboardInterrupt: the user stops following.
    """
    while True:
        job = sent.job
        try:
            info = follow(client, job, show)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"no longer following; {job} goes on. The same command follows again, gtl jobs stop {job} ends it"
            ) from None
        end = end_of(info)
        if sent.key is not None:
            wipe_secrets(client, sent.key)
        if not is_tried_again(end, retries):
            show.close()
            tell_end(job, end, info, say)
            return exit_status(end)
        show.flush()
        since = sent.since or (stamp(info.start_time) if info.start_time else None)
        attempt, retries = sent.attempt + 1, retries - 1
        say(f"{job} was lost ({why(end, info)}); sent again as attempt {attempt}, with {retries} more left")
        time.sleep(PAUSE_S)
        with laid(client, parcel) as key:
            sent = send(client, parcel, attempt, key, since)


def end_of(info: JobDetails) -> End:
    """The part of what Ray says that decides."""
    return End(str(info.status), info.driver_exit_code, info.error_type)


def why(end: End, info: JobDetails) -> str:
    """What ended it, in a few words."""
    if end.exit_code is not None:
        return f"exit status {end.exit_code}"
    return ((info.message or "").strip().splitlines() or [end.status])[0][:200]


def tell_end(job: str, end: End, info: JobDetails, say: Say) -> None:
    """Say how it ended, unless it is done, which its results say."""
    found = meaning(end)
    if found in ("lost", "failed"):
        say(f"{job} {'was lost' if found == 'lost' else 'failed'}: {why(end, info)}; the same gtl submit begins anew")
    elif found == "stopped":
        say(f"{job} was stopped")
