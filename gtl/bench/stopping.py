"""`gtl bench stopping`: what early stopping would have cost a study whose trials all ran to their end."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from gtl import __version__
from gtl.bench.setting import check_counts, check_file
from gtl.config import load_study
from gtl.report.chart import short
from gtl.report.study import Study, read_study
from gtl.report.text import columns
from gtl.search.replay import Curve, Outcome, cost, replay
from gtl.storage import Store
from gtl.types import UserError


def bench_stopping(
    folder: str, overrides: Sequence[str], orders: int, concurrency: int, seed: int, file: Path | None
) -> dict[str, Any]:
    """Replay a finished study under ASHA, in many orders of its trials.

    Args:
        folder: URL of the study, whose trials all ran to their end (scheduler.type: fifo).
        overrides: `key=value` for the study, such as scheduler.reduction_factor=4.
        orders: How many, drawn at random.
        concurrency: Trials at once.
        seed: Of the orders.
        file: Where the result is written too, as JSON.

    Returns:
        See `summary`.

    Raises:
        UserError: an argument is out of range, or the study has not what is needed.
    """
    from gtl.search.schedule import STEP, make_scheduler

    check_counts({"--orders": orders, "--concurrency": concurrency})
    check_file(file)
    record = read_study(Store(folder))
    asked = load_study(f"{record.url}/study.yaml", ["scheduler={type: asha}", *overrides])
    ((metric, mode),) = asked.directions.items()
    curves = curves_of(record, metric)
    paces = {one.trial: one.device_hours / one.steps for one in record.trials if one.steps}
    steps = max(curve[-1][0] for curve in curves.values())
    rng, outcomes, drawn = random.Random(seed), [], []
    for _ in range(orders):
        order = rng.sample(sorted(curves), len(curves))
        scheduler = make_scheduler(asked, steps)
        outcomes.append(replay(scheduler, curves, order, concurrency, (STEP, metric), mode, paces))
        drawn.append(order)
    result = {
        "study": f"{record.name}@{record.version}", "metric": metric, "mode": mode, "concurrency": concurrency,
        "seed": seed, "scheduler": asked.scheduler.model_dump(mode="json"),
        **summary(curves, mode, drawn, outcomes), "gtl": __version__,
    }  # fmt: skip
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")
    return result


def curves_of(record: Study, metric: str) -> dict[str, Curve]:
    """The looks of a study's trials; those that failed are left out.

    Raises:
        UserError: trials were stopped or have not ended, or fewer than two have the metric.
    """
    if cut := [one for one in record.trials if one.state not in ("finished", "failed")]:
        raise UserError(
            f"{record.url}: {cut[0].trial} is {cut[0].state}: a replay needs whole trials; "
            "give a study that ended, with scheduler.type: fifo"
        )
    found = {one.trial: [(int(step), value) for step, value in one.series(metric)] for one in record.trials}
    curves: dict[str, Curve] = {one.trial: found[one.trial] for one in record.trials if one.state == "finished"}
    curves = {trial: curve for trial, curve in curves.items() if any(math.isfinite(value) for _, value in curve)}
    if len(curves) < 2:
        raise UserError(f"{record.url}: {len(curves)} whole trials with {metric}: a replay needs two or more")
    return curves


def summary(
    curves: Mapping[str, Curve], mode: str, orders: Sequence[Sequence[str]], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """What was lost and what was spared.

    Returns:
        `regret`: the best trial's metric less the chosen one's, as a loss, over orders; `whole_regret`: the same of the
        first trials of each order run whole, as many as the same steps are good for (at least one); `share`: of the
        steps of all trials; `found`: share of orders in which the best trial was chosen; `spread`: between the best
        trial and the worst.
    """
    costs = {name: cost(curve, mode) for name, curve in curves.items()}
    lengths = {name: curve[-1][0] for name, curve in curves.items()}
    best, total = min(costs, key=lambda name: costs[name]), sum(lengths.values())
    whole = []
    for order, outcome in zip(orders, outcomes, strict=True):
        fits = sum(steps <= outcome.spent for steps in accumulate(lengths[name] for name in order))
        whole.append(min(costs[name] for name in order[: max(fits, 1)]) - costs[best])
    return {
        "trials": len(curves), "orders": len(outcomes), "best": best, "spread": max(costs.values()) - costs[best],
        "regret": distribution([costs[outcome.chosen] - costs[best] for outcome in outcomes]),
        "whole_regret": distribution(whole),
        "share": distribution([outcome.spent / total for outcome in outcomes]),
        "found": statistics.fmean(costs[outcome.chosen] == costs[best] for outcome in outcomes),
    }  # fmt: skip


def distribution(values: Sequence[float]) -> dict[str, float]:
    """Mean and quantiles: the smallest of the values that so large a share of them does not exceed."""
    ordered = sorted(values)
    at = {f"q{share}": ordered[max(0, math.ceil(share / 100 * len(ordered)) - 1)] for share in (10, 50, 90)}
    return {"mean": statistics.fmean(values), **at, "max": ordered[-1]}


def table(result: Mapping[str, Any]) -> str:
    """A result for reading."""
    names = ("mean", "q10", "q50", "q90", "max")
    rows = [["", "mean", "10 %", "median", "90 %", "most"]]
    for key, title in (
        ("regret", f"regret in {result['metric']}"), ("whole_regret", "of as many steps on whole trials"),
        ("share", "share of all steps"),
    ):  # fmt: skip
        rows.append([title, *(short(result[key][name]) for name in names)])
    return (
        f"{result['study']}: {result['orders']} orders of {result['trials']} whole trials, {result['concurrency']} at "
        f"once, under {result['scheduler']['type']}\n{columns(rows)}\n"
        f"the best, {result['best']}, was chosen in {result['found']:.0%}; best and worst are "
        f"{short(result['spread'])} apart"
    )
