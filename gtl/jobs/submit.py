"""Sending a job: the checks before it, whether the cluster has it already, and its attempts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gtl import __version__
from gtl.jobs import checks, pack
from gtl.jobs.ahead import check_there
from gtl.jobs.client import ATTEMPT, COMMAND, CONTENT, MARK, SINCE, our_jobs, wipe_secrets
from gtl.jobs.parcel import Parcel, Taken, begin, laid
from gtl.jobs.work import Work
from gtl.types import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


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


def find_or_send(client: JobSubmissionClient, parcel: Parcel, say: Callable[[str], None]) -> Sent:
    """The attempt that makes another one needless, the newest if it waits, runs or is done; else a new one.

    Before a new one is sent the cluster makes the checks that only it can make.

    Raises:
        UserError: a check fails, or the cluster does not take it.
    """
    known = [(job, job.metadata or {}) for job in our_jobs(client)]
    same = [(int(told[ATTEMPT]), job, told) for job, told in known if told.get(CONTENT) == parcel.content]
    attempt = 1
    if same:
        newest, job, told = max(same, key=lambda row: row[0])
        if str(job.status) not in ("FAILED", "STOPPED"):
            return Sent(str(job.submission_id), newest, told.get(SINCE), status=str(job.status))
        attempt = newest + 1
    with laid(client, parcel) as key:
        check_there(client, parcel, key, say)
        return send(client, parcel, attempt, key)


def send(
    client: JobSubmissionClient, parcel: Parcel, attempt: int, key: str | None, since: str | None = None
) -> Sent:  # fmt: skip
    """Submit an attempt; if somebody else has just submitted the same one, theirs is it.

    Args:
        client: Of the cluster.
        parcel: What is sent.
        attempt: Its number, from 1.
        key: See `laid`.
        since: When the attempts began that it goes on from; None: it begins anew.

    Raises:
        UserError: the cluster does not take it.
    """
    metadata = {MARK: __version__, CONTENT: parcel.content, COMMAND: parcel.command, ATTEMPT: str(attempt)}
    job = parcel.id(attempt)
    try:
        begin(client, parcel, job, key, metadata | ({SINCE: since} if since else {}), since=since)
    except Taken:
        if key:
            wipe_secrets(client, key)
        return Sent(job, attempt, since, status="PENDING")
    return Sent(job, attempt, since, key)
