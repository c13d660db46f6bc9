"""A page about a run, or about several side by side: one HTML file that needs nothing else."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from gtl import __version__
from gtl.report.chart import short
from gtl.report.curves import draw_curves
from gtl.report.facts import Facts, differences, incomparable, lineage, next_commands, state, summary
from gtl.report.run import Run


def environment() -> Environment:
    """The templates of all pages. Whatever they are given is escaped."""
    return Environment(
        loader=PackageLoader("gtl.report"), autoescape=select_autoescape(), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What a page says about one run."""

    run: Run
    state: str
    summary: Facts
    validations: list[dict[str, str]]
    lineage: Facts
    commands: list[str]


def render(runs: Sequence[Run]) -> str:
    """The page about the first run, with the others beside it."""
    now = datetime.datetime.now(datetime.timezone.utc)
    parts = [
        Part(run, state(run), summary(run), validations(run), lineage(run), next_commands(run)) for run in runs
    ]  # fmt: skip
    return environment().get_template("run.html").render(
        title=" and ".join(run.title for run in runs),
        parts=parts,
        columns=[run.title for run in runs],
        summaries={row: [part.summary.get(row, "") for part in parts] for part in parts for row in part.summary},
        charts=draw_curves(runs),
        warnings=incomparable(runs),
        differences=differences(runs),
        version=__version__,
        made=now.strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip


def validations(run: Run) -> list[dict[str, str]]:
    """The rows with a validation: what was measured -> its value."""
    keys = ["step", *sorted({key for row in run.rows for key in row if key.startswith("val_")})]
    return [{key: short(row[key]) if key in row else "" for key in keys} for row in run.rows if "val_loss" in row]
