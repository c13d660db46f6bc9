"""A page about a run, or about several side by side: one HTML file that needs nothing else."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from gtl import __version__
from gtl.config.metrics import METRICS
from gtl.report.chart import short
from gtl.report.curves import STRATA, draw_curves, place_of
from gtl.report.evaluations import interval
from gtl.report.facts import Facts, differences, incomparable, lineage, next_commands, state, summary
from gtl.report.run import Run
from gtl.types import UserError


def environment() -> Environment:
    """The templates of all pages. Whatever they are given is escaped."""
    return Environment(
        loader=PackageLoader("gtl.report"), autoescape=select_autoescape(), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


Compare = Callable[[dict[str, Any], dict[str, Any]], list[dict[str, str]]]
"""Two files of evaluations -> how the second's scores differ from the first's, a metric a row; raises UserError where
they do not go together."""


@dataclass(frozen=True)
class Comparison:
    """How the scores of two runs differ."""

    title: str
    rows: list[dict[str, str]]
    note: str = ""


@dataclass(frozen=True)
class Part:
    """What a page says about one run."""

    run: Run
    state: str
    summary: Facts
    validations: list[dict[str, str]]
    lineage: Facts
    commands: list[str]


def render(runs: Sequence[Run], compare: Compare | None = None) -> str:
    """The page about the first run, with the others beside it, and with what `compare` says of their scores."""
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
        compared=compared(runs, compare) if compare is not None else [],
        version=__version__,
        made=now.strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip


def validations(run: Run) -> list[dict[str, str]]:
    """The rows of looks: what was measured -> its value, with its interval."""
    names = {key for row in run.rows for key in row if key in METRICS or key.startswith(STRATA)}
    keys = sorted(names, key=place_of)
    bounds = {key: {step: f" ({interval(low, high)})" for step, low, high in run.bounds(key)} for key in keys}
    return [
        {
            "step": short(row["step"]) + (", published" if row["step"] == run.best_step else ""),
            **{key: short(row[key]) + bounds[key].get(int(row["step"]), "") if key in row else "" for key in keys},
        }
        for row in run.rows if names & row.keys()
    ]  # fmt: skip


def compared(runs: Sequence[Run], compare: Compare) -> list[Comparison]:
    """How the scores of the other runs differ from the first's, by the newest evaluations that go together."""
    found = []
    for other in runs[1:]:
        title, reason = f"{other.title} less {runs[0].title}", "not scored both"
        for mine, theirs in itertools.product(runs[0].scores, other.scores):
            try:
                found.append(Comparison(title, compare(mine.values, theirs.values)))
                break
            except UserError as error:
                reason = str(error)
        else:
            found.append(Comparison(title, [], f"Not compared: {reason}"))
    return found
