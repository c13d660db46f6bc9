"""What a cluster is sent for a command, and how Ray is told to begin it."""

from __future__ import annotations

import hashlib
import json
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtl import __version__
from gtl.jobs import pack
from gtl.jobs.checks import versions
from gtl.jobs.client import answered, put_secrets, wipe_secrets
from gtl.jobs.inside import ORDER
from gtl.jobs.secrets import HOOK, KEY

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

STOP_S = 600
"""That a job which is stopped may take to save. Ray kills after three seconds where it is not told."""
TAKEN = "use a different submission_id"
"""How Ray refuses a submission id that it has."""
NO_AGENT = "No available agent"
AGENT_S = 60.0
"""That a head may have none."""
ENTRY = (
    "python -c 'import gtl.jobs' || {{ echo 'error: gtl: not installed on the cluster, nor in the tree that was sent; "
    "install gtl {version} in its image' >&2; exit 2; }}; exec python -m gtl.jobs.inside {command}"
)
"""What Ray runs, in a shell."""


class Taken(Exception):  # noqa: N818 - it is what happened
    """The cluster has a job of that id already."""


@dataclass(frozen=True)
class Parcel:
    """All that a cluster is sent for a command."""

    verb: str
    arguments: tuple[str, ...]
    """Of the command, without `gtl`."""
    files: Mapping[str, bytes]
    """By their path in the job's working directory."""
    sends_tree: bool
    name: str | None
    """Of the run or study."""
    writes: Mapping[str, str]
    """Key or option -> place."""
    room: Sequence[Mapping[str, float]] = ()
    """Places that an autoscaler has to make."""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def content(self) -> str:
        """What makes two submissions the same: the command, the recipe with all that was set, and the tree."""
        return hashlib.sha256(json.dumps([self.arguments, pack.digest(self.files)]).encode()).hexdigest()

    @property
    def command(self) -> str:
        """For a shell, without `gtl`."""
        return shlex.join(self.arguments)

    def id(self, attempt: int) -> str:
        """The submission id of an attempt, the first of which has no number."""
        base = f"gtl-{self.verb}-{self.content[:12]}"
        return base if attempt == 1 else f"{base}-{attempt}"


@contextmanager
def laid(client: JobSubmissionClient, parcel: Parcel) -> Iterator[str | None]:
    """The key under which the cluster has a parcel's secrets, None without any; they are wiped if the block fails."""
    key = put_secrets(client, parcel.secrets) if parcel.secrets else None
    try:
        yield key
    except BaseException:
        if key:
            wipe_secrets(client, key)
        raise


def begin(
    client: JobSubmissionClient, parcel: Parcel, job: str, key: str | None, metadata: Mapping[str, str] | None = None,
    *, since: str | None = None, only_checks: bool = False,
) -> None:  # fmt: skip
    """Have Ray begin it.

    Args:
        client: Of the cluster.
        parcel: What is sent.
        job: The submission id.
        key: See `laid`.
        metadata: What is told of the job when it is listed.
        since: When the attempts began that it goes on from; None: it begins anew.
        only_checks: The job ends before its command begins.

    Raises:
        Taken: somebody else began the same just now.
        UserError: the cluster does not take it.
    """
    order: dict[str, Any] = {
        "versions": versions(), "sends_tree": parcel.sends_tree, "name": parcel.name, "since": since,
        "writes": dict(parcel.writes), "room": list(parcel.room), "only_checks": only_checks,
    }  # fmt: skip
    env = {ORDER: json.dumps(order), "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S), **({KEY: key} if key else {})}
    with tempfile.TemporaryDirectory() as folder, answered(client.get_address()):
        archive = Path(folder) / "package.zip"
        pack.write_archive(parcel.files, archive)
        hook = {"worker_process_setup_hook": HOOK} if key else {}
        runtime = {"working_dir": str(archive), "env_vars": env, **hook}
        asked = time.monotonic()
        while True:
            try:
                client.submit_job(
                    entrypoint=ENTRY.format(version=__version__, command=parcel.command), submission_id=job,
                    runtime_env=runtime, metadata=dict(metadata or {}),
                )  # fmt: skip
                return
            except RuntimeError as error:
                if TAKEN in str(error):
                    raise Taken from None
                # A head that has just begun has its dashboard before its agent.
                if NO_AGENT not in str(error) or time.monotonic() - asked > AGENT_S:
                    raise
                time.sleep(1)
