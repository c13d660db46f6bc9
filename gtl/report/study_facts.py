"""What a page says about a study in words and tables."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from gtl.config.judged import COSTS
from gtl.config.space import Domain, alternatives, label
from gtl.report.chart import short
from gtl.report.evaluations import interval
from gtl.report.facts import Facts, duration, value_at
from gtl.report.importance import FEWEST, Group, Importance, importance
from gtl.report.ranking import Outcome, measured, rank
from gtl.report.scatter import Entry, Scatter
from gtl.report.study import Study, Trial
from gtl.report.study_charts import Board, by_key, interval_text, name_of, value_text

ENDED = ("finished", "stopped", "failed")
EDGE = 0.1
"""Of a range, at either end: what lies in it may lie beyond the range, too."""


@dataclass(frozen=True)
class Reason:
    """What one key has to do with a metric."""

    key: str
    name: str
    share: Importance | None
    """None with too few trials."""
    told: list[str]
    """Sentences."""
    best: str
    """Its best values and what came of them; empty where chance explains as much."""
    chart: Scatter | None


def state(study: Study) -> str:
    """How far the study is."""
    return "finished" if study.ended is not None else "not finished"


def summary(board: Board) -> Facts:
    """The numbers that one asks for first."""
    study, lead = board.study, board.lead
    counts = study.numbers()
    wanted = {"max": "highest", "min": "lowest"}
    facts = {
        "Searched": ", ".join(study.space),
        "For": " and ".join(f"the {wanted[mode]} {name}" for name, mode in study.directions.items()),
        "Trials": f"{len(study.trials)}: " + ", ".join(f"{count} {state}" for state, count in counts.items()),
    }  # fmt: skip
    for name in study.directions if lead is not None else ():
        assert lead is not None
        if name in lead.metrics:
            whose = f"{lead.trial}, {'the winner' if study.winner else 'the best so far'}"
            when = "" if name in COSTS else f" at step {lead.best_step}"
            facts[f"{name} in the search"] = f"{short(lead.metrics[name])}{when} of {whose}"
    began = f"began {study.began:%Y-%m-%d %H:%M} UTC"
    facts["Time"] = began if study.hours is None else f"{duration(study.hours * 3600)}, {began}"
    facts["Device time"] = f"{short(sum(one.device_hours for one in study.trials))} device-hours in training"
    if saved := steps_made(study):
        facts["Steps"] = saved
    if study.published:
        facts["Published"] = ", ".join(study.published)
    facts["Study"] = study.url
    return facts


@dataclass(frozen=True)
class Headline:
    """The leader at first sight."""

    number: str
    unit: str
    told: str
    values: dict[str, str]


def headline(board: Board) -> Headline | None:
    """What stands over all else; None before a trial was measured."""
    study, lead = board.study, board.lead
    if lead is None:
        return None
    again = next((one for one in study.finalists if one.trial == lead.trial), None)
    if again is not None and again.low is not None and again.high is not None:
        reach = interval(again.low, again.high)
        number = short(again.value)
        unit = f"{again.metric}; 95 % interval {reach}, of {again.samples} pictures on fresh seeds"
    else:
        number, unit = short(lead.metrics[study.metric]), f"{study.metric} at step {lead.best_step}"
    several = len(study.tied) > 1  # one is the runner-up, of whom the verdict speaks
    tied = f" Chance may have put it before all of {', '.join(study.tied)}." if several else ""
    values = {name_of(key, study): value_text(value) for key, value in lead.config.items()}
    return Headline(number, unit, study.verdict + ("." if study.verdict else "") + tied, values)


def steps_made(study: Study) -> str:
    """Steps of all trials, and what share that is of training each of them in full, where that is known."""
    made = sum(one.steps for one in study.trials)
    whole = value_at(study.asked, "recipe.train.steps") if "train.steps" not in study.space else None
    whole = (study.asked.get("set") or {}).get("train.steps", whole)
    begun = [one for one in study.trials if one.state in ENDED]
    if not isinstance(whole, int) or not any(one.state == "stopped" for one in begun):
        return str(made)
    share = sum(one.steps for one in begun) / (whole * len(begun))
    return f"{made}; {percent(share)} of what the {len(begun)} trials that ended would have made in full"


def searched(domain: Domain) -> str:
    """How a key was drawn, in words."""
    when = " and ".join(
        f"{key} is {' or '.join(map(label, alternatives(wanted)))}" for key, wanted in domain.when.items()
    )
    if domain.bounds is None:
        text = ", ".join(map(value_text, domain.values))
    else:
        low, high = domain.bounds
        steps = f" in steps of {short(domain.step)}" if domain.step is not None and domain.step != 1 else ""
        text = f"{short(low)} to {short(high)}{steps}" + (", by its logarithm" if domain.is_log else "")
    return f"{text}; where {when}" if when else text


def configurations(board: Board) -> list[dict[str, str]]:
    """A row for each key: what was searched, what won, and what lost."""
    study, lead = board.study, board.lead
    last = worst(board)
    rows = []
    for key, domain in study.space.items():
        row = {"key": key, "searched": searched(domain)}
        if lead is not None:
            row["winner" if study.winner else "best so far"] = (
                value_text(lead.config[key]) if key in lead.config else ""
            )
        if last is not None:
            row["worst that ran to its end"] = value_text(last.config[key]) if key in last.config else ""
        rows.append(row)
    return rows


def worst(board: Board) -> Trial | None:
    """The worst of the trials that ran to their end, unless that is the leader."""
    ended = [one for one in board.order if one.state == "finished" and board.study.metric in one.metrics]
    return ended[-1] if ended and ended[-1] != board.lead else None


def reasons(board: Board, metric: str) -> list[Reason]:
    """What each key has to do with a metric, the most telling one first."""
    found = [reason(board, key, domain, metric) for key, domain in board.study.space.items()]
    return sorted(found, key=lambda one: (not one.best, -one.share.share if one.share is not None else 1.0))


def reason(board: Board, key: str, domain: Domain, metric: str) -> Reason:
    """What a key has to do with a metric."""
    places = standings(board.study, metric)
    trials = [one for one in board.study.trials if one.trial in places and key in one.config]
    share = importance(domain, [one.config[key] for one in trials], [places[one.trial] for one in trials])
    told, best = [f"Fewer than {FEWEST} trials have ended with it, or all alike: too few to say."], ""
    if share is not None:
        words = "more than chance explains" if share.is_clear else "no more than chance explains"
        order = f"{percent(share.share)} of the order of {share.trials} trials"
        told = [f"Accounts for {order}: {words} (up to {percent(share.chance)})."]
    if share is not None and share.is_clear:
        members = [trials[i] for i in share.groups[0].members] if metric == board.study.metric else []
        best = f"Best {group_text(share.groups[0], trials, metric)}."
        told += [best, f"Worst {group_text(share.groups[-1], trials, metric)}.", *edge(board, key, domain, members)]
    return Reason(key, name_of(key, board.study), share, told, best, by_key(board, key, metric))


def why(board: Board, found: Sequence[Reason]) -> str:
    """What decided the first metric, in a few sentences."""
    known = [one for one in found if one.share is not None]
    if not known:
        return "" if board.study.ended is None else "There were too few trials to say what decided."
    clear, rest = [one for one in known if one.best], [one.name for one in known if not one.best]
    parts: list[str] = []
    for one in clear:
        assert one.share is not None
        order = "Then it goes" if parts else "The order of the trials goes"
        parts.append(f"{order} with {one.name} ({percent(one.share.share)}). {one.best}")
    parts += [f"Of {', '.join(rest)} these trials show no more than chance would."] if rest else []
    return " ".join(parts)


def percent(share: float) -> str:
    """For people."""
    return f"{100 * share:.0f} %"


def standings(study: Study, metric: str) -> dict[str, int]:
    """Trial that ended -> its place by one metric, equal ones alike; those that failed are last, but by a cost."""
    directions = {metric: study.directions[metric]}
    outcomes = measured([Outcome(one.trial, one.metrics) for one in study.trials if one.state in ENDED], directions)
    values = [outcome.metrics[metric] for outcome in rank(outcomes, directions)]
    places = {outcome.trial: values.index(outcome.metrics[metric]) for outcome in outcomes}
    lost = [one.trial for one in study.trials if one.state == "failed" and one.trial not in places]
    return places if metric in COSTS else {**places, **dict.fromkeys(lost, len(values))}


def group_text(group: Group, trials: Sequence[Trial], metric: str) -> str:
    """The values of a group and what came of them."""
    members = [trials[i] for i in group.members]
    values = [one.metrics[metric] for one in members if metric in one.metrics]
    middle = f"median {metric} {short(median(values))}" if values else f"no {metric}"
    failed = sum(metric not in one.metrics for one in members)
    of = f"{len(members)} trial{'s' * (len(members) > 1)}" + (f", {failed} failed" if failed else "")
    return f"at {group.text}: {middle} ({of})"


def edge(board: Board, key: str, domain: Domain, best: Sequence[Trial]) -> list[str]:
    """That the leader is at an end of what was searched, if it is and is one of those with the best values."""
    if board.lead is None or board.lead not in best:
        return []
    share = share_of(domain, board.lead.config[key])
    if share is None or EDGE < share < 1 - EDGE:
        return []
    end = "lower" if share <= EDGE else "upper"
    return [f"{board.lead.trial} is at the {end} end of what was searched: beyond it may lie better ones."]


def share_of(domain: Domain, value: Any) -> float | None:
    """Where a value is between the lowest, 0, and the highest, 1; None where there is no order."""
    if domain.bounds is not None:
        low, high = domain.bounds
        turn = math.log if domain.is_log else float
        return (turn(value) - turn(low)) / (turn(high) - turn(low))
    values = list(domain.values)
    if len(values) < 3 or any(type(one) not in (int, float) for one in values) or value not in values:
        return None
    return sorted(values).index(value) / (len(values) - 1)


def next_commands(board: Board) -> list[str]:
    """What one would type now."""
    study, commands = board.study, []
    registry = (study.asked.get("set") or {}).get("storage.registry", value_at(study.asked, "recipe.storage.registry"))
    where = f"--registry {shlex.quote(str(registry))}"
    asked = value_at(study.asked, "recipe.evaluate.prompts")
    prompt = shlex.quote(asked[0] if isinstance(asked, list) and asked else "...")
    for name in study.published[:1]:
        commands.append(f"gtl generate --adapter {name} --prompt {prompt} --out drawn {where}")
        commands.append(f"gtl adapters promote {name} prod {where}")
    if study.ended is None:
        commands.append(f"gtl tune {shlex.quote(f'{study.url}/study.yaml')} --name {study.name} --resume")
    last = worst(board)
    if board.lead is not None:
        others = f" --compare {shlex.quote(last.run)}" if last is not None else ""
        commands.append(f"gtl report {shlex.quote(board.lead.run)}{others}")
    return commands


@dataclass(frozen=True)
class Line:
    """A trial's row in the table."""

    entry: Entry
    cells: dict[str, str]


def table(board: Board) -> list[Line]:
    """A row for each trial, the best first."""
    study = board.study
    again = {one.trial: interval_text(one.value, one.low, one.high) for one in study.finalists}
    lines = []
    for one in board.order:
        cells = {"trial": one.trial, **keys_of(one, study)}
        cells |= {name: short(one.metrics[name]) if name in one.metrics else "" for name in study.directions}
        cells |= {"measured again": again.get(one.trial, "")} if again else {}
        cells |= {"steps": str(one.steps), "state": f"{one.state}: {one.reason}" if one.reason else one.state}
        lines.append(Line(board.entry(one), cells))
    return lines


def keys_of(trial: Trial, study: Study) -> dict[str, str]:
    """The name of each key -> a trial's value."""
    return {name_of(key, study): value_text(trial.config[key]) if key in trial.config else "" for key in study.space}
