"""Ray Tune's schedulers and searchers, made as a study says."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

from gtl.config import Study
from gtl.config.search import Asha, BohbBands, HyperBand, HyperoptSearch, OptunaSearch, Pbt
from gtl.config.trials import longest
from gtl.search.space import define_by_run, keep_inside, mutations, tune_domains
from gtl.types import UserError

if TYPE_CHECKING:
    from ray.tune.schedulers import HyperBandScheduler, TrialScheduler
    from ray.tune.search import Searcher

    from gtl.search.record import TrialRecord

STEP = "step"
"""The metric that says how far a trial is: the optimizer steps it has made, also after it was resumed or took over
another's weights, where Ray Tune's own count of reports starts anew."""
LOOK = "look"
"""The same in looks, of which HyperBand makes its brackets."""
INSTALL = {
    "optuna": ("optuna", "pip install 'gtl[search]'"),
    "hyperopt": ("hyperopt", "pip install hyperopt"),
    "bohb": ("hpbandster", "pip install hpbandster ConfigSpace"),
}
"""Searcher -> what it needs, and how to get it."""

Bands = TypeVar("Bands", bound="HyperBandScheduler")


def make_scheduler(study: Study, steps: int | None = None, *, together: bool = True) -> TrialScheduler:
    """The scheduler. All that trials report to Ray Tune has to have `step` and the study's metrics: rows at looks.

    Args:
        study: See `gtl.load_study`.
        steps: Optimizer steps of the longest trial; needed where the recipe says epochs.
        together: Whether all trials have a place at once, so that those of a population can wait for each other.

    Raises:
        UserError: there is nothing between a trial's first look and its last.
        ValueError: the steps are not known.
    """
    from ray.tune.schedulers import FIFOScheduler, HyperBandScheduler
    from ray.tune.schedulers.hb_bohb import HyperBandForBOHB

    config, every = study.scheduler, study.base.evaluate.every
    if config.type == "fifo":
        return FIFOScheduler()
    steps = longest(study) if steps is None else steps
    if steps is None:
        raise ValueError("steps: the recipe says epochs, so how many steps these are has to be given")
    if every >= steps:
        raise UserError(f"evaluate.every: {every}: nothing is measured before the last of {steps} steps")
    ((metric, mode),) = study.directions.items()
    if isinstance(config, Asha):
        return make_asha(config, metric, mode, steps=steps, every=every, warmup=study.base.train.schedule.warmup)
    if isinstance(config, Pbt):
        return make_population(config, study, steps=steps, every=every, together=together)
    assert isinstance(config, HyperBand | BohbBands)
    kind = HyperBandForBOHB if isinstance(config, BohbBands) else HyperBandScheduler
    # The brackets are as deep as its unit of time is fine; in steps the first cut would be before the first look.
    return counting_looks(kind, every)(
        LOOK, metric, mode, max_t=math.ceil(steps / every), reduction_factor=config.reduction_factor,
        stop_last_trials=False,
    )  # fmt: skip


def make_asha(config: Asha, metric: str, mode: str, *, steps: int, every: int, warmup: int = 0) -> TrialScheduler:
    """ASHA without a rung in the second half of a run: the last look never stops a trial, which is to publish then.

    Args:
        config: The study's section.
        metric: What it goes by.
        mode: max or min.
        steps: Optimizer steps of the longest trial.
        every: Steps between two looks.
        warmup: Steps of the learning rate's warm-up, in which nobody can be judged.
    """
    from ray.tune.schedulers import ASHAScheduler

    grace = config.grace_period
    if grace == "auto":
        looks = max(round(steps / config.reduction_factor**2 / every), math.ceil(warmup / every), 1)
        grace = min(looks, (steps - 1) // every) * every
    return ASHAScheduler(
        STEP, metric, mode, max_t=max(steps // 2, grace), grace_period=grace, reduction_factor=config.reduction_factor,
        brackets=config.brackets, stop_last_trials=False,
    )  # fmt: skip


def remember(scheduler: TrialScheduler, study: Study, trials: Sequence[TrialRecord]) -> None:
    """Let ASHA judge by what trials had reached before a study was cut off, too: Ray Tune does not keep that."""
    from ray.tune.schedulers import ASHAScheduler

    if not isinstance(scheduler, ASHAScheduler):
        return
    ((metric, mode),) = study.directions.items()
    for trial in trials:
        who: Any = SimpleNamespace(trial_id=f"before-{trial.trial}")
        for look in trial.looks if trial.state in ("finished", "stopped") else ():
            value = look[metric] if mode == "max" else -look[metric]
            scheduler._brackets[0].on_result(who, int(look[STEP]), value)


def make_population(config: Pbt, study: Study, *, steps: int, every: int, together: bool) -> TrialScheduler:
    """Population based training, see `gtl.search.population`.

    Args:
        config: The study's section.
        study: Says what may change and how far.
        steps: Optimizer steps of a trial.
        every: Steps between two looks.
        together: Whether all trials have a place at once.
    """
    from gtl.search.population import Population

    ((metric, mode),) = study.directions.items()
    interval = max(every, steps // 8) if config.interval == "auto" else config.interval
    return Population(
        steps=steps, together=together, metric=metric, mode=mode, perturbation_interval=interval,
        burn_in_period=interval, hyperparam_mutations=mutations(study), quantile_fraction=config.quantile,
        resample_probability=config.resample, perturbation_factors=config.factors,
        custom_explore_fn=partial(keep_inside, study.space),
    )  # fmt: skip


def counting_looks(kind: type[Bands], every: int) -> type[Bands]:
    """The scheduler, with the looks that a trial's steps are."""

    class CountingLooks(kind):  # type: ignore[valid-type, misc]
        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            result[LOOK] = math.ceil(result[STEP] / every)
            return str(super().on_trial_result(controller, trial, result))

    return CountingLooks


def check_searcher(study: Study) -> None:
    """Refuse a searcher whose package is not there, before anything is done for its study.

    Raises:
        UserError: so.
    """
    kind = study.searcher.type
    if kind in INSTALL and importlib.util.find_spec(INSTALL[kind][0]) is None:
        package, command = INSTALL[kind]
        raise UserError(f"searcher.type: {kind}: needs the package {package}; {command}")


def make_searcher(study: Study) -> Searcher | None:
    """The searcher, with the study's space; None for a random or a grid study, whose `param_space` says it all.

    Raises:
        UserError: it needs a package that is not installed.
    """
    config = study.searcher
    if config.type not in INSTALL:
        return None
    check_searcher(study)
    if isinstance(config, OptunaSearch):
        return make_optuna(config, study)
    ((metric, mode),) = study.directions.items()
    if isinstance(config, HyperoptSearch):
        from ray.tune.search.hyperopt import HyperOptSearch

        domains = HyperOptSearch.convert_search_space(tune_domains(study))
        return HyperOptSearch(
            domains, metric, mode, n_initial_points=config.startup, random_state_seed=config.seed
        )  # fmt: skip
    from ray.tune.search.bohb import TuneBOHB

    return TuneBOHB(TuneBOHB.convert_search_space(tune_domains(study)), metric=metric, mode=mode, seed=config.seed)


def make_optuna(config: OptunaSearch, study: Study) -> Searcher:
    """Optuna's, of one metric or several.

    Keys are modelled together, in groups of those that apply together. Trials that still run count as poor ones, so
    that trials that start at once do not start at one place.
    """
    import optuna
    from ray.tune.search.optuna import OptunaSearch as Search

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it has a line for every study
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # which groups have been since 2021
        sampler = optuna.samplers.TPESampler(
            seed=config.seed, n_startup_trials=config.startup, multivariate=True, group=True, constant_liar=True
        )
    metrics, modes = list(study.directions), [str(mode) for mode in study.directions.values()]
    one = len(metrics) == 1
    return Search(
        partial(define_by_run, study.space),  # Ray Tune pickles it with the searcher's state
        metric=metrics[0] if one else metrics,
        mode=modes[0] if one else modes,
        sampler=sampler,
    )
