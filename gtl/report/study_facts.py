"""What a page says about a study in words and tables."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from gtl.config.judged import COSTS
from gtl.config.space import Domain, alternatives, label
from gtl.report.chart import short
from gtl.report.evaluations import interval
from gtl.report.facts import Facts, duration, value_at
from gtl.report.scatter import Entry
from gtl.report.study import ENDED, Study, Trial
from gtl.report.study_charts import Board, interval_text, name_of, value_text
from gtl.report.study_reasons import percent


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
    if study.advice:
        facts["Images"] = study.advice["images"]
        facts |= {
            f"Kind {one['kind']}": f"{'tried' if one['is_tried'] else 'left out'}: {one['why']}"
            for one in study.advice["kinds"]
        }
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
        of = "held-out images at fresh noise" if again.metric == "val_loss" else "pictures on fresh seeds"
        unit = f"{again.metric}; 95 % interval {reach}, of {again.samples} {of}"
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
