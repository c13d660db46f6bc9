"""A study as its folder shows it: what was searched, what came of each trial, who won."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gtl.config.load import read_yaml
from gtl.config.space import Domain, Space
from gtl.report.ranking import Directions, Outcome, rank
from gtl.report.run import SMALL, STUDY, Picture, find_pictures, read_picture
from gtl.storage import Store
from gtl.types import UserError

RECORD = "study.json"
"""In a study's folder: what has come of it."""
ENDED = ("finished", "stopped", "failed")
STATES = (*ENDED, "running", "waiting")

State = Literal["finished", "stopped", "failed", "running", "waiting"]


@dataclass(frozen=True)
class Trial:
    """What is known of one configuration."""

    trial: str
    config: dict[str, Any]
    """Dotted keys of the recipe -> values; without those that do not apply."""
    state: State
    run: str
    """URL of its run."""
    reason: str | None = None
    """Why it failed."""
    steps: int = 0
    """Made."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The study's, of the best look; finite ones only."""
    best_step: int | None = None
    device_hours: float = 0.0
    looks: list[dict[str, float]] = field(default_factory=list)
    """What was measured, with its step."""

    def series(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) of the looks that have a metric."""
        return [(look["step"], look[metric]) for look in self.looks if metric in look]


@dataclass(frozen=True)
class Finalist:
    """A trial that was measured again, on seeds that nobody was chosen by."""

    trial: str
    metric: str
    value: float
    low: float | None
    high: float | None
    samples: int


@dataclass(frozen=True)
class Study:
    """What a study has left so far."""

    name: str
    version: str
    url: str
    """Of its folder."""
    asked: dict[str, Any]
    """`study.yaml`."""
    text: str
    """The same, as it stands there."""
    directions: Directions
    """The metrics, the first one first, and which way each is better."""
    space: Space
    began: datetime.datetime
    ended: datetime.datetime | None
    hours: float | None
    """On the clock."""
    trials: list[Trial]
    finalists: list[Finalist]
    """Best first."""
    winner: str | None
    verdict: str
    """By how much it won, in one line."""
    tied: list[str]
    """Trials that cannot be told from the winner."""
    published: list[str]
    """NAME@VERSION, best first."""
    advice: Mapping[str, Any] = field(default_factory=dict)
    """Of `kinds: auto`: what is known of the images, and of each kind whether it was tried, and why."""

    @property
    def title(self) -> str:
        """NAME@VERSION."""
        return f"{self.name}@{self.version}"

    @property
    def metric(self) -> str:
        """The first one, which decides where one has to."""
        return next(iter(self.directions))

    def numbers(self) -> dict[str, int]:
        """State -> how many trials are in it."""
        counts = {state: sum(one.state == state for one in self.trials) for state in STATES}
        return {state: count for state, count in counts.items() if count}


def is_study(folder: Store) -> bool:
    """Whether a folder is a study's, not a run's."""
    return folder.exists(STUDY)


def read_study(folder: Store) -> Study:
    """Read a study's folder.

    Raises:
        UserError: it has no trials yet, or a store fails.
    """
    name, version = folder.url().split("/")[-2:]
    if not folder.exists(RECORD):
        raise UserError(f"study {name}@{version}: no {RECORD} yet in {folder.url()}; it comes with the first trial")
    text, values = folder.read(STUDY).decode(), json.loads(folder.read(RECORD))
    winner, ended = values["winner"] or {}, values["ended"]
    began = datetime.datetime.fromisoformat(values["began"])
    closed = datetime.datetime.fromisoformat(ended) if ended else None
    hours = values.get("hours", (closed - began).total_seconds() / 3600 if closed else None)
    space = {key: Domain.model_validate(domain) for key, domain in values["space"].items()}
    return Study(
        name, version, folder.url(), read_yaml(text), text,
        {metric: values["directions"][metric] for metric in values["metrics"]}, space, began, closed, hours,
        [read_trial(one) for one in values["trials"]], [Finalist(**one) for one in values["finalists"]],
        winner.get("trial"), winner.get("text", ""), list(winner.get("tied", ())), list(values["published"]),
        values.get("advice", {}),
    )  # fmt: skip


def read_trial(values: Mapping[str, Any]) -> Trial:
    """A trial, of whose numbers only finite ones are kept, but in its looks."""
    known = {key: values[key] for key in Trial.__dataclass_fields__ if key in values}
    metrics = {name: float(v) for name, v in values["metrics"].items() if v is not None and math.isfinite(v)}
    looks = [{name: float(v) for name, v in look.items() if v is not None} for look in values["looks"]]
    return Trial(**{**known, "metrics": metrics, "looks": looks})


def standing(study: Study) -> list[Trial]:
    """Its trials, the best first.

    Those that were measured again come before others that ran to their end, then those that run, then those that were
    stopped, then those that failed; within each by the study's metrics. Those that wait are left out.
    """
    place = {one.trial: i for i, one in enumerate(study.finalists)}
    order, last, states = by_metrics(study), len(study.trials), ("finished", "running", "stopped", "failed")

    def key(one: Trial) -> tuple[int, int, int, str]:
        return (place.get(one.trial, last), states.index(one.state), order.get(one.trial, last), one.trial)

    return sorted((one for one in study.trials if one.state != "waiting"), key=key)


def by_metrics(study: Study) -> dict[str, int]:
    """Trial -> its place by the study's own numbers, of those that have them all."""
    ranked = rank([Outcome(one.trial, one.metrics) for one in study.trials], study.directions)
    return {outcome.trial: i for i, outcome in enumerate(ranked)}


def leader(study: Study) -> Trial | None:
    """The winner; while there is none yet, the best of those that nothing has stopped."""
    if study.winner is not None:
        return next(one for one in study.trials if one.trial == study.winner)
    order = by_metrics(study)
    left = [one for one in study.trials if one.state in ("finished", "running") and one.trial in order]
    return min(left, key=lambda one: order[one.trial], default=None)


def read_grid(trial: Trial) -> Picture | None:
    """What a trial drew: after its best look, or the newest if that drew nothing; None if there is nothing."""
    folder = Store(trial.run)
    grids = find_pictures(folder)
    if not grids:
        return None
    return read_picture(folder, grids.get(trial.best_step or 0, grids[max(grids)]), SMALL)
