"""`gtl submit` and `gtl jobs`: commands as jobs of a remote cluster."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from gtl.cli.options import AsJson
from gtl.types import UserError

RETRIES = 3
"""Further attempts of a job that is followed."""

app = typer.Typer(no_args_is_help=True, help="The jobs that gtl submit sent to a cluster: list, logs, stop.")
Address = Annotated[
    str | None,
    typer.Option(envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
                 help="URL of the cluster's dashboard, such as http://head:8265."),
]  # fmt: skip
JobId = Annotated[str, typer.Argument(metavar="JOB", help="As gtl submit or gtl jobs list names it.")]


def say(text: str) -> None:
    """Tell people, not scripts."""
    print(text, file=sys.stderr, flush=True)


def submit(
    context: typer.Context,
    command: Annotated[list[str], typer.Argument(
        metavar="-- COMMAND ...", help="Of gtl: train, tune, evaluate, generate or cache, with its arguments.",
    )],
    address: Address = None,
    follow: Annotated[bool, typer.Option(
        "--follow", help="Show its output; end as it ends: 0 done, 2 a mistake of yours, 1 else. Ctrl-C stops "
        "following, not the job.",
    )] = False,
    retries: Annotated[int | None, typer.Option(
        min=0, help="With --follow: so often the job is sent again when the cluster lost it (a machine died, it was "
        f"killed); train and tune go on with --resume. {RETRIES} when left out. Without --follow a job runs once.",
    )] = None,
    secret: Annotated[list[str] | None, typer.Option(
        metavar="NAME", help="Also set this variable there, to its value here. No list of jobs, environments or logs "
        "shows the value; whoever may run code on the cluster can read it while the job lasts.",
    )] = None,
    recipe_only: Annotated[bool, typer.Option(
        "--recipe-only", help="Send the recipe and not the working folder; gtl is the one that the cluster has.",
    )] = False,
) -> None:  # fmt: skip
    """Run a command as a job of a remote cluster; what is the same as a job that runs or is done finds that one.

    The working folder is sent, without what .gitignore and .rayignore name, images, runs, caches and registries. The
    recipe is read here: relative paths in it mean folders of this machine, so name buckets, or folders that the
    cluster's machines mount at the same place.
    """
    from gtl.jobs import work
    from gtl.jobs.client import connect
    from gtl.jobs.follow import Away, Output, see_through
    from gtl.jobs.submit import find_or_send, make_parcel, read_secrets

    if retries is not None and not follow:
        raise UserError(f"--retries {retries}: only with --follow: it is this command that sends a lost job again")
    verb, *rest = command
    work.check_verb(verb)
    parsed = context.find_root().command.get_command(context, verb)  # type: ignore[attr-defined]
    tree = None if recipe_only else Path.cwd()
    asked = work.read_work(verb, parsed.make_context(verb, rest, parent=context).params, tree)
    secrets = read_secrets(secret or ())
    client = connect(address)
    parcel = make_parcel(client, asked, [verb, *arguments_of(parsed, asked.values)], tree, secrets, say)
    sent = find_or_send(client, parcel, say)
    if sent.status is None:
        say(f"submitted {sent.job}, {len(parcel.files)} files; gtl jobs stop {sent.job} ends it")
    else:
        say(f"{sent.job}: the same was submitted before, and is {sent.status.lower()}")
    if not follow:
        print(sent.job)
        return
    try:
        status = see_through(client, parcel, sent, RETRIES if retries is None else retries, Output(sys.stdout), say)
    except Away as error:
        say(f"error: {error}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt as error:
        say(str(error) or "interrupted")
        raise typer.Exit(130) from None
    raise typer.Exit(status)


def arguments_of(parsed: Any, values: Mapping[str, Any]) -> list[str]:
    """A command line that parses to these values."""
    options, positional = [], []
    for parameter in parsed.params:
        value = values.get(parameter.name)
        if value is None or value == parameter.default or value == () or value == []:
            continue
        if parameter.param_type_name == "argument":
            positional.append(str(value))
        elif getattr(parameter, "is_flag", False):
            options.append(parameter.opts[0])
        else:
            for one in value if isinstance(value, (list, tuple)) else [value]:
                options += [parameter.opts[0], str(one)]
    return [*positional, *options]


@app.command("list")
def list_(address: Address = None, json_: AsJson = False) -> None:
    """The jobs that gtl sent, oldest first."""
    from gtl.jobs.client import connect, our_jobs
    from gtl.jobs.listing import rows, table

    found = rows(our_jobs(connect(address)))
    print(json.dumps(found, indent=2) if json_ else table(found))


@app.command("logs")
def logs(
    job: JobId, address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Until the job is over.")] = False,
) -> None:  # fmt: skip
    """A job's output so far."""
    from gtl.jobs.client import answered, connect, find_job
    from gtl.jobs.follow import Away, Output, end_of
    from gtl.jobs.follow import follow as go_along
    from gtl.jobs.verdict import exit_status

    client = connect(address)
    find_job(client, job)
    show = Output(sys.stdout)
    if not follow:
        with answered(client.get_address()):
            show(client.get_job_logs(job))
        show.flush()
        return
    try:
        info = go_along(client, job, show)
    except Away as error:
        say(f"error: {error}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        say(f"no longer following; {job} goes on")
        raise typer.Exit(130) from None
    show.close()
    raise typer.Exit(exit_status(end_of(info)))


@app.command("stop")
def stop(job: JobId, address: Address = None, json_: AsJson = False) -> None:
    """Ask a job to stop; train and tune save first, and --resume goes on."""
    from gtl.jobs.client import answered, connect, find_job

    client = connect(address)
    status = str(find_job(client, job).status)
    with answered(client.get_address()):
        stopping = client.stop_job(job)
    if json_:
        print(json.dumps({"job": job, "stopping": stopping}))
    else:
        print(f"stopping {job}; it saves first" if stopping else f"{job} is {status.lower()}")
