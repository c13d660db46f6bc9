"""What the keys of a study have to do with its metrics, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from gtl.config.judged import COSTS
from gtl.config.space import Domain
from gtl.report.chart import short
from gtl.report.importance import FEWEST, Group, Importance, importance
from gtl.report.ranking import Outcome, measured, rank
from gtl.report.scatter import Scatter
from gtl.report.study import Study, Trial
from gtl.report.study_charts import Board, by_key, name_of

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


def standings(study: Study, metric: str) -> dict[str, int]:
    """Trial that ended -> its place by one metric, equal ones alike.

    Those that failed are last, whatever they had been before; of a cost they say nothing.
    """
    directions = {metric: study.directions[metric]}
    ended = [Outcome(one.trial, one.metrics) for one in study.trials if one.state in ("finished", "stopped")]
    outcomes = measured(ended, directions)
    values = [outcome.metrics[metric] for outcome in rank(outcomes, directions)]
    places = {outcome.trial: values.index(outcome.metrics[metric]) for outcome in outcomes}
    failed = [one.trial for one in study.trials if one.state == "failed"]
    return places if metric in COSTS else {**places, **dict.fromkeys(failed, len(values))}


def group_text(group: Group, trials: Sequence[Trial], metric: str) -> str:
    """The values of a group and what came of them."""
    members = [trials[i] for i in group.members]
    values = [one.metrics[metric] for one in members if one.state != "failed"]
    middle = f"median {metric} {short(median(values))}" if values else f"no {metric}"
    failed = len(members) - len(values)
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


def percent(share: float) -> str:
    """For people."""
    return f"{100 * share:.0f} %"
