"""What a study knows of its trials, in its folder: what `gtl report` reads and `gtl tune --resume` goes on from."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gtl.config import Study
from gtl.report.chart import short
from gtl.report.text import columns
from gtl.search.choose import Outcome, rank
from gtl.storage import Store
from gtl.train.best import Best
from gtl.train.job import RESULT
from gtl.train.track import read_rows

SCHEMA = 1
STUDY, RECORD = "study.yaml", "study.json"
"""In a study's folder: what was asked for, and what has come of it."""
ENDED = ("finished", "stopped", "failed")


def trial_name(number: int) -> str:
    """How a trial is called."""
    return f"{number:05d}"


@dataclass
class TrialRecord:
    """One trial."""

    trial: str
    config: dict[str, Any]
    """Dotted keys of the recipe -> values; without those that do not apply."""
    run: str
    """URL of its run."""
    state: str = "waiting"
    """waiting, running, finished, stopped (before its end, since others were better, or time was up) or failed."""
    reason: str | None = None
    """Why it failed."""
    carried: str | None = None
    """The trial at the smallest rank whose configuration this is, where the study carries that over ranks."""
    steps: int = 0
    """Made."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The study's, of the best look by the first of them."""
    best_step: int | None = None
    device_hours: float = 0.0
    looks: list[dict[str, float]] = field(default_factory=list)
    """What was measured, by step."""

    def read(self, run: Store, metrics: Sequence[str], costs: Mapping[str, float], devices: float) -> None:
        """Take in what the run has left so far.

        Args:
            run: Its folder.
            metrics: The study's, without costs.
            costs: The study's costs so far.
            devices: Of the trial, where it has not yet added up its hours.
        """
        rows = [row for row in read_rows(run) if row["step"]]
        keys = ("step", *metrics, "val_loss")
        self.looks = [
            {key: float(row[key]) for key in keys if row.get(key) is not None}  # type: ignore[arg-type]
            for row in rows if all(name in row for name in metrics)
        ]  # fmt: skip
        self.steps = int(rows[-1]["step"] or 0) if rows else 0
        spent = sum(float(row.get("step_seconds") or 0) for row in rows) / 3600 * devices
        self.device_hours = json.loads(run.read(RESULT))["device_hours"] if run.exists(RESULT) else spent
        best = Best(metrics[0])
        for look in self.looks:
            best.take(int(look["step"]), look[metrics[0]])
        if best.step:
            look = next(look for look in self.looks if look["step"] == best.step)
            self.best_step, self.metrics = best.step, {name: look[name] for name in metrics}
            self.metrics |= {name: value for name, value in costs.items() if math.isfinite(value)}

    def outcome(self) -> Outcome:
        """For `gtl.search.choose`."""
        return Outcome(self.trial, self.metrics)


class Record:
    """All of a study's trials and what came of them; written whenever something changed."""

    def __init__(self, folder: Store, name: str, version: str, study: Study) -> None:
        """What an earlier part of the study left, or nothing yet."""
        self.folder, self.name, self.version, self.study = folder, name, version, study
        self.trials: dict[str, TrialRecord] = {}
        self.began = now()
        self.ended: str | None = None
        self.hours = 0.0
        """On the clock, in earlier parts."""
        self.finalists: list[dict[str, Any]] = []
        self.winner: dict[str, Any] | None = None
        self.published: list[str] = []
        self.advice: dict[str, Any] = {}
        """Of `kinds: auto`: what is known of the images, and of each kind whether it is tried, and why."""
        if folder.exists(RECORD):
            values = json.loads(folder.read(RECORD))
            self.began, self.hours = values["began"], values["hours"]
            self.trials = {one["trial"]: TrialRecord(**one) for one in values["trials"]}
            self.advice = values.get("advice", {})

    def save(self, hours: float) -> None:
        """Write it; `hours` on the clock since this part began."""
        study = self.study.model_dump(mode="json")
        values = {
            "schema": SCHEMA, "name": self.name, "version": self.version, "metrics": list(self.study.metrics),
            "directions": self.study.directions, "space": study["space"], "began": self.began, "ended": self.ended,
            "hours": self.hours + hours, "trials": [vars(self.trials[name]) for name in sorted(self.trials)],
            "finalists": self.finalists, "winner": self.winner, "published": self.published,
            "advice": self.advice,
        }  # fmt: skip
        self.folder.write(RECORD, (json.dumps(values, indent=1) + "\n").encode())

    @property
    def device_hours(self) -> float:
        """Of all trials."""
        return sum(trial.device_hours for trial in self.trials.values())

    def table(self) -> str:
        """The trials for a terminal, best first, and who won."""
        ranked = [
            outcome.trial for outcome in rank([one.outcome() for one in self.trials.values()], self.study.directions)
        ]
        order = sorted(self.trials, key=lambda name: (
            self.trials[name].state != "finished", ranked.index(name) if name in ranked else len(ranked), name
        ))  # fmt: skip
        rows = [["trial", *self.study.space, *self.study.metrics, "steps", "state"]]
        for name in order:
            one = self.trials[name]
            values = [shown(one.config[key]) if key in one.config else "" for key in self.study.space]
            values += [shown(one.metrics[key]) if key in one.metrics else "" for key in self.study.metrics]
            rows.append([name, *values, str(one.steps), f"{one.state}: {one.reason}" if one.reason else one.state])
        text = columns(rows)
        text = "\n".join([*self.advised(), "", text]) if self.advice else text
        return text if self.winner is None else f"{text}\n\nwinner {self.winner['text']}"

    def advised(self) -> list[str]:
        """What `kinds: auto` came to, a line for the images and one for each kind."""
        kinds = [
            f"{one['kind']}: {'tried' if one['is_tried'] else 'left out'}; {one['why']}" for one in self.advice["kinds"]
        ]
        return [self.advice["images"], *kinds]

    def finished(self) -> list[Outcome]:
        """The trials that ran to their end, in their order."""
        return [one.outcome() for _, one in sorted(self.trials.items()) if one.state == "finished"]

    def best(self) -> TrialRecord | None:
        """The best so far by the first metric, of all that were measured."""
        name = self.study.metrics[0]
        ranked = rank([one.outcome() for one in self.trials.values()], {name: self.study.directions[name]})
        return self.trials[ranked[0].trial] if ranked else None


def shown(value: Any) -> str:
    """For people."""
    return short(float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def now() -> str:
    """The time, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
