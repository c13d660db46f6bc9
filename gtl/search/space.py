"""What a study tries, in the terms of Ray Tune and of Optuna."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from gtl.config import Study
from gtl.config.space import Domain, Space, applies, applying, label, parents_first, points

if TYPE_CHECKING:
    from optuna.trial import Trial

TRIAL = "trial"
"""Key of a trial's number in what Ray Tune gives it, beside those of the space."""
ENOUGH = 100
"""Draws for each trial before what is left of a small space is taken in order."""


def configurations(study: Study) -> list[dict[str, Any]]:
    """What a random or a grid study tries, in this order: by dotted keys of the recipe, without those that don't apply.

    The same study gives the same list in every process, and with more trials one that goes on from it. No two are the
    same, but in a population (pbt), whose members go ways of their own. Those that a rate is carried to (transfer_rank)
    are not among them: see `carried`.
    """
    study = study.at_smallest_rank
    if study.searcher.type == "grid":
        found = list(itertools.islice(points(study.space), study.num_points))
        if study.num_trials < len(found) or study.budget.hours or study.budget.gpu_hours:
            random.Random(study.searcher.seed).shuffle(found)  # what is tried should not be all of one corner
        return found[: study.num_trials]
    if study.scheduler.type == "pbt":
        return [draw(study, number) for number in range(study.num_trials)]
    draws: Iterator[dict[str, Any]] = (draw(study, number) for number in range(ENOUGH * study.num_trials))
    if study.num_points is not None:
        draws = itertools.chain(draws, points(study.space))
    seen: dict[str, dict[str, Any]] = {}
    for values in draws:
        seen.setdefault(json.dumps(values, sort_keys=True), values)
        if len(seen) == study.num_trials:
            break
    return list(seen.values())


def carried(study: Study, best: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The best configuration at the smallest rank, at every other rank in turn."""
    others = sorted(set(study.space["tuner.rank"].values) - {best["tuner.rank"]})
    return [study.configuration({**best, "tuner.rank": rank}) for rank in others]


def draw(study: Study, number: int) -> dict[str, Any]:
    """One random configuration; `grid` keys take their values in turn, each of their combinations equally often.

    Every key has a generator of its own, so that a key more leaves the others' draws as they were.
    """
    values: dict[str, Any] = {}
    turn = number
    for key, domain in study.space.items():
        if domain.kind == "grid":
            turn, position = divmod(turn, len(domain.values))
            values[key] = domain.values[position]
        else:
            values[key] = domain.at(random.Random(f"{study.searcher.seed} {number} {key}").random())
    return applying(study.space, values)


def param_space(study: Study, configs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Ray Tune's search space of trials that are known, by their numbers: one trial each.

    A trial's config is flat: its number under `trial`, and every key of the space, None where it does not apply;
    `Study.configuration` and `Study.recipe_of` know which do. In a population (pbt), who takes over another's weights
    takes over its number too.
    """
    from ray import tune

    chosen = {key: tune.sample_from(partial(look_up, configs, key)) for key in study.space}
    return {TRIAL: tune.grid_search(list(configs)), **chosen}


def look_up(configs: Mapping[int, Mapping[str, Any]], key: str, given: Mapping[str, Any]) -> Any:
    """A key's value in the configuration of the trial whose config is given, or something that has it as `config`."""
    return configs[given.get("config", given)[TRIAL]].get(key)


def define_by_run(space: Space, trial: Trial) -> dict[str, Any]:
    """Draw a configuration with Optuna, which is asked for a key only where it applies: no model is fitted to values
    of no effect. What is returned has the real values; of a list or a section Optuna itself is told a label."""
    values: dict[str, Any] = {}
    for key in parents_first(space):
        if applies(space, key, values):
            values[key] = suggest_one(trial, key, space[key])
    return applying(space, values)


def suggest_one(trial: Trial, key: str, domain: Domain) -> Any:
    """One key's value. Optuna has no steps on a logarithm: such a value is put on one afterwards."""
    if domain.bounds is None:
        labels = {label(value): value for value in domain.values}
        return labels[trial.suggest_categorical(key, list(labels))]
    low, high = domain.bounds
    if domain.is_integer:
        return trial.suggest_int(key, int(low), int(high), step=int(domain.step or 1))
    step = None if domain.is_log else domain.step
    return domain.snap(trial.suggest_float(key, low, high, step=step, log=domain.is_log))


def tune_domains(study: Study) -> dict[str, Any]:
    """The space in Ray Tune's own terms, for searchers that know neither conditions nor steps.

    All keys are drawn; `Study.configuration` leaves out those that do not apply, and puts numbers on their steps.
    """
    return {key: tune_domain(domain) for key, domain in study.space.items()}


def tune_domain(domain: Domain) -> Any:
    """One key's."""
    from ray import tune

    if domain.bounds is None:
        return tune.choice(list(domain.values))
    low, high = domain.bounds
    if domain.is_integer:
        return tune.randint(int(low), int(high) + 1)
    return (tune.loguniform if domain.is_log else tune.uniform)(low, high)


def mutations(study: Study) -> dict[str, Any]:
    """What population based training changes: listed values by their neighbours, ranges by a factor."""
    return {key: list(domain.values) if domain.is_list else tune_domain(domain) for key, domain in study.space.items()}


def keep_inside(space: Space, config: dict[str, Any]) -> dict[str, Any]:
    """A trial's config with what a factor took out of its range put back into it, and onto its step."""
    inside = {key: domain.snap(config[key]) for key, domain in space.items() if domain.bounds is not None}
    return {**config, **inside}
