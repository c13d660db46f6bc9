"""The door to Ray Jobs: a client, what it is asked, and one line for whatever goes wrong."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gtl.types import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

MARK, CONTENT, COMMAND, ATTEMPT, SINCE = "gtl", "gtl.content", "gtl.command", "gtl.attempt", "gtl.since"
"""Keys of a job's metadata: the version of gtl that sent it, what it is by its content, the command, its number among
those of the same content, and when the first of those began that it goes on from."""
HEADERS = "RAY_JOB_HEADERS"
"""JSON in the environment, as Ray's own command line reads it."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the cluster at an address: the URL of its dashboard, or what `ray.init` takes.

    Raises:
        UserError: none was given, nothing answers there, or it refuses us.
    """
    if not address:
        raise UserError("--address: which cluster? give the URL of its dashboard, or set RAY_API_SERVER_ADDRESS")
    if "://" not in address and address != "auto":
        raise UserError(f"--address {address}: expected the URL of a dashboard, such as http://{address.split(':')[0]}:8265")
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard_sdk", "job.sdk"):  # which tell of every upload and connection
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray lets its variables overrule what a caller asks for
    with answered(address):
        return JobSubmissionClient(address, headers=read_headers())


def read_headers() -> dict[str, Any]:
    """Headers for a proxy in front of the dashboard.

    Raises:
        UserError: they are no JSON object.
    """
    text = os.environ.get(HEADERS)
    try:
        headers = json.loads(text) if text else {}
    except ValueError as error:
        raise UserError(f"{HEADERS}: not JSON ({error}); expected such as " + '\'{"Cookie": "..."}\'') from error
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        raise UserError(f"{HEADERS}: expected a JSON object of names and values")
    return headers


@contextmanager
def answered(address: str) -> Iterator[None]:
    """Turn what goes wrong between here and the dashboard into one line."""
    from ray.exceptions import AuthenticationError, RpcError

    try:
        yield
    except UserError:
        raise
    except AuthenticationError as error:
        if "Authentication failed" in str(error):
            raise UserError(
                f"RAY_AUTH_TOKEN: {address} refuses this token; set the cluster's, there or in ~/.ray/auth_token"
            ) from None
        raise UserError(
            f"RAY_AUTH_TOKEN: {address} wants a token; set RAY_AUTH_MODE=token, and the token in RAY_AUTH_TOKEN or "
            "~/.ray/auth_token"
        ) from None
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--address {address}: no dashboard of a Ray cluster answers there ({reason})") from error
    except (RuntimeError, RpcError, ValueError, KeyError, TypeError) as error:  # the last ones: of what is no dashboard
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--address {address}: the dashboard answers: {reason}") from error


def ask(client: JobSubmissionClient, path: str) -> Any:
    """JSON that the dashboard answers.

    Raises:
        UserError: it does not.
    """
    address = client.get_address()
    with answered(address):
        answer = client._do_request("GET", path)  # with Ray's own token, cookies and headers
        if answer.status_code != 200:
            raise UserError(f"--address {address}: {path} answers {answer.status_code}: {answer.text[:200]}")
        return answer.json()


def our_jobs(client: JobSubmissionClient) -> list[JobDetails]:
    """The jobs that gtl sent, oldest first."""
    with answered(client.get_address()):
        found = [job for job in client.list_jobs() if job.submission_id and MARK in (job.metadata or {})]
    return sorted(found, key=lambda job: job.start_time or 0)


def find_job(client: JobSubmissionClient, name: str) -> JobDetails:
    """A job of gtl's by its id.

    Raises:
        UserError: there is none.
    """
    jobs = our_jobs(client)
    for job in jobs:
        if job.submission_id == name:
            return job
    there = ", ".join(str(job.submission_id) for job in jobs) or "none"
    raise UserError(f"job {name!r}: gtl sent no such job to {client.get_address()}; there are: {there}")


def put_secrets(client: JobSubmissionClient, values: Mapping[str, str]) -> str:
    """Lay values where only the cluster's own processes reach; returns under which key.

    The key says nothing about them. That is the memory of the head node, where Ray keeps packages: nothing that lists
    jobs, environments or logs reads it, and the dashboard only tells whether there is such a package.
    """
    key = f"gtl_{secrets.token_hex(16)}.zip"
    put(client, key, json.dumps(dict(values)).encode())
    return key


def wipe_secrets(client: JobSubmissionClient, key: str) -> None:
    """Overwrite what was laid there; the job does so itself at its end, unless it was killed."""
    put(client, key, b"{}")


def put(client: JobSubmissionClient, key: str, data: bytes) -> None:
    """Store bytes under the name of a package."""
    address = client.get_address()
    with answered(address):
        answer = client._do_request("PUT", f"/api/packages/gcs/{key}", data=data)
        if answer.status_code != 200:
            raise UserError(f"--address {address}: it took no package ({answer.status_code})")
