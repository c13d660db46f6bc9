"""Sending a job: what it is by its content, whether the cluster has it already, and its attempts."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gtl import __version__
from gtl.jobs import checks, pack
from gtl.jobs.client import ATTEMPT, COMMAND, CONTENT, MARK, SINCE, answered, our_jobs, put_secrets, wipe_secrets
from gtl.jobs.inside import ORDER
from gtl.jobs.secrets import HOOK, KEY
from gtl.jobs.work import Work
from gtl.types import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

STOP_S = 600
"""That a job which is stopped may take to save. Ray kills after three seconds where it is not told."""
ENTRY = (
    "python -c 'import gtl.jobs' || {{ echo 'error: gtl: not installed on the cluster, nor in the tree that was sent; "
    "install gtl {version} in its image' >&2; exit 2; }}; exec python -m gtl.jobs.inside {command}"
)
"""What Ray runs, in a shell."""


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

    def id(self, attempt: int) -> str:
        """The submission id of an attempt, the first of which has no number."""
        base = f"gtl-{self.verb}-{self.content[:12]}"
        return base if attempt == 1 else f"{base}-{attempt}"


def make_parcel(
    client: JobSubmissionClient, work: Work, arguments: Sequence[str], tree: Path | None, secrets: Mapping[str, str],
    say: Callable[[str], None],
) -> Parcel:  # fmt: skip
    """Check that the cluster is one that the job can run on, and gather what it is sent.

    Args:
        client: Of the cluster.
        work: See `read_work`.
        arguments: The command line of it.
        tree: The folder that is sent; None: only what the command names.
        secrets: Values by name.
        say: Takes warnings.

    Raises:
        UserError: a check fails, or the tree is too large or cannot be read.
    """
    site = checks.look(client)
    checks.check_versions(site, tree is not None)
    if warning := checks.check_places(work, site.nodes, tree or Path.cwd()):
        say(warning)
    room = checks.check_room(work.recipe, site) if work.recipe is not None else []
    files = dict(work.files)
    if tree is not None:
        without = [place for place in (*work.writes.values(), *work.reads.values()) if "://" not in place]
        files = {**pack.read_tree(tree, without), **files}
    return Parcel(work.verb, tuple(arguments), files, tree is not None, work.name, work.writes, tuple(room), secrets)


def read_secrets(names: Sequence[str]) -> dict[str, str]:
    """Their values in the environment here.

    Raises:
        UserError: one is not set.
    """
    for name in names:
        if "=" in name:  # its value stays unsaid
            raise UserError(f"--secret {name.partition('=')[0]}: export it, and name it without a value")
        if not os.environ.get(name):
            raise UserError(f"--secret {name}: not set in the environment here; export it, and name it without a value")
    return {name: os.environ[name] for name in names}


class Sent(NamedTuple):
    """An attempt that the cluster has."""

    job: str
    """Its submission id."""
    attempt: int
    since: str | None = None
    """When the attempts began that it goes on from; None: it began anew."""
    key: str | None = None
    """Where its secrets lie, if this process laid them there."""
    status: str | None = None
    """If it was there before."""


def find_or_send(client: JobSubmissionClient, parcel: Parcel) -> Sent:
    """The attempt that makes another one needless, the newest if it waits, runs or is done; else a new one.

    Raises:
        UserError: the cluster does not take it.
    """
    known = [(job, job.metadata or {}) for job in our_jobs(client)]
    same = [(int(told[ATTEMPT]), job, told) for job, told in known if told.get(CONTENT) == parcel.content]
    if not same:
        return send(client, parcel, 1)
    attempt, job, told = max(same, key=lambda row: row[0])
    if str(job.status) in ("FAILED", "STOPPED"):
        return send(client, parcel, attempt + 1)
    return Sent(str(job.submission_id), attempt, told.get(SINCE), status=str(job.status))


def send(client: JobSubmissionClient, parcel: Parcel, attempt: int, since: str | None = None) -> Sent:
    """Submit an attempt.

    Args:
        client: Of the cluster.
        parcel: What is sent.
        attempt: Its number, from 1.
        since: When the attempts began that it goes on from; None: it begins anew.

    Raises:
        UserError: the cluster does not take it.
    """
    order: dict[str, Any] = {
        "versions": checks.versions(), "sends_tree": parcel.sends_tree, "name": parcel.name, "since": since,
        "writes": dict(parcel.writes), "room": list(parcel.room),
    }  # fmt: skip
    key = put_secrets(client, parcel.secrets) if parcel.secrets else None
    env = {ORDER: json.dumps(order), "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S), **({KEY: key} if key else {})}
    command = shlex.join(parcel.arguments)
    metadata = {MARK: __version__, CONTENT: parcel.content, COMMAND: command, ATTEMPT: str(attempt)}
    try:
        with tempfile.TemporaryDirectory() as folder, answered(client.get_address()):
            archive = Path(folder) / "package.zip"
            pack.write_archive(parcel.files, archive)
            hook = {"worker_process_setup_hook": HOOK} if key else {}
            client.submit_job(
                entrypoint=ENTRY.format(version=__version__, command=command), submission_id=parcel.id(attempt),
                runtime_env={"working_dir": str(archive), "env_vars": env, **hook},
                metadata=metadata | ({SINCE: since} if since else {}),
            )  # fmt: skip
    except UserError:
        if key:
            wipe_secrets(client, key)
        raise
    return Sent(parcel.id(attempt), attempt, since, key)
