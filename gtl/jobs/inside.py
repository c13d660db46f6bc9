"""What a job runs, on the cluster: checks, then the command, then what its end says about the cluster.

A job that makes the checks alone comes before (`gtl.jobs.ahead`); this one makes them again, since its machines may be
others: some that an autoscaler added for it, or those of another attempt.

    python -m gtl.jobs.inside train dog.yaml

It is told the rest in the environment. Of exit statuses: the command's own; 2 where a check fails; LOST where the
command failed and a machine of the cluster went away in the meantime.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from gtl.config import load_recipe, load_study
from gtl.jobs import probe, secrets
from gtl.jobs.checks import versions
from gtl.jobs.resume import left_of
from gtl.jobs.work import RESUMABLE
from gtl.session import session
from gtl.storage import Store
from gtl.types import UserError

ORDER = "GTL_JOB"
"""In the environment: the JSON of what the submitter knows."""
LOST = 75
"""EX_TEMPFAIL: the same again may work."""
T = TypeVar("T")
GTL = "from gtl.cli import main; main()"
"""The command, in the job's own Python, whether a script `gtl` is on its path or not."""


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns the job's exit status."""
    import ray

    order: dict[str, Any] = json.loads(os.environ[ORDER])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through all that is to be taken back
    try:
        check_versions(order)
        with session():
            if secrets.KEY in os.environ:
                secrets.load()
            if order["only_checks"]:
                probe.check_nodes(order["writes"])
                return 0
            if order["room"]:
                probe.make_room(order["room"], tell)
            probe.check_nodes(order["writes"])
            before = probe.lost(ray.nodes())
        more = go_on(order, arguments)
        if more is None:
            return 0
        status = run([*arguments, *more])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if secrets.KEY in os.environ and not order["only_checks"]:  # else the job that follows needs them
            end(secrets.wipe)
    gone = end(lambda: probe.lost(ray.nodes(), before)) if status == 1 else None
    if gone:
        print("job: a machine of the cluster was lost while the command ran", file=sys.stderr)
        return LOST
    return status


def check_versions(order: dict[str, Any]) -> None:
    """Refuse a recipe of another gtl, or a tree of another Python.

    Raises:
        UserError: the versions differ.
    """
    theirs, mine = order["versions"], versions()
    compared = ("gtl", "python") if order["sends_tree"] else ("gtl",)
    for name in compared:
        if theirs[name] != mine[name]:
            raise UserError(
                f"{name}: {theirs[name]} where this was submitted, {mine[name]} on the cluster; install the same "
                "version on both"
            )


def go_on(order: dict[str, Any], arguments: Sequence[str]) -> list[str] | None:
    """What to add to the command so that it goes on from an attempt before this; None if nothing is left to do."""
    verb = arguments[0]
    if order["since"] is None or verb not in RESUMABLE or "--resume" in arguments:
        return []
    recipe = load_study(arguments[1]).base if verb == "tune" else load_recipe(arguments[1])
    left = left_of(verb, Store(f"{recipe.storage.runs}/{order['name']}"), order["name"], order["since"], recipe)
    for adapter in left.adapters:
        print(f"adapter {adapter}")
    if left.adapters:
        return None
    return ["--resume"] if left.can_resume else []


def run(arguments: Sequence[str]) -> int:
    """Run the command to its end; a signal's number counts as in a shell.

    Ray sends SIGTERM to every process of a job that is stopped. The command saves, and this one waits until it has.
    """
    with waiting_through(signal.SIGTERM), subprocess.Popen([sys.executable, "-c", GTL, *arguments]) as command:
        status = command.wait()
    return status if status >= 0 else 128 - status


@contextmanager
def waiting_through(number: signal.Signals) -> Iterator[None]:
    """Do nothing at a signal. A handler, since what is ignored would be ignored by processes begun here too."""
    before = signal.signal(number, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(number, before)


def end(what: Callable[[], T]) -> T | None:
    """Ask the cluster something when the command is over; None if it no longer answers."""
    try:
        with session():
            return what()
    except (UserError, OSError, RuntimeError):
        return None


def tell(phase: str, done: int, total: int, detail: str = "") -> None:
    """Progress of what is done before the command begins."""
    print(f"{phase} {detail}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
