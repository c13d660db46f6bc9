"""What a study tries, and how Ray Tune's schedulers and Optuna take it."""

import collections
import copy
import importlib.util
import json
import statistics
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.search.variant_generator import generate_variants

from gtl.config import Study, parse_study
from gtl.config.load import set_study_key
from gtl.data.dataset import Cuts, Dataset
from gtl.search.forecast import forecast
from gtl.search.room import corners, most_steps
from gtl.search.schedule import make_scheduler, make_searcher
from gtl.search.space import carried, configurations, keep_inside, mutations, param_space
from gtl.search.study import tune
from gtl.storage import Store
from gtl.types import Entry, Record, UserError

BASE: dict[str, Any] = {
    "recipe": {
        "model": {"source": "org/name"}, "data": {"source": "s3://bucket/photos"}, "train": {"steps": 300},
        "evaluate": {"every": 30},
    },
    "space": {
        "tuner.rank": {"choice": [4, 8], "when": {"tuner.type": "lora"}},
        "tuner.type": {"choice": ["lora", "freeze"]},
        "tuner.freeze_depth": {"quniform": [0.0, 0.8, 0.2], "when": {"tuner.type": "freeze"}},
    },
    "metric": "prompt_accuracy",
}  # fmt: skip
LORA = [{"tuner.rank": rank, "tuner.type": "lora"} for rank in (4, 8)]
FREEZE = [{"tuner.type": "freeze", "tuner.freeze_depth": depth} for depth in (0.0, 0.2, 0.4, 0.6, 0.8)]
RATE = "space={train.learning_rate: {loguniform: [1e-5, 1e-2]}}"


def study(*overrides: str) -> Study:
    values = copy.deepcopy(BASE)
    for override in overrides:
        set_study_key(values, override, "study.yaml")
    return parse_study(values)


def test_a_grid_is_every_configuration_once_and_never_two_that_differ_in_nothing() -> None:
    assert configurations(study("searcher.type=grid")) == [*LORA, *FREEZE]


def test_a_part_of_a_grid_is_drawn_from_all_of_it() -> None:
    some = configurations(study("searcher={type: grid, seed: 1}", "trials=4"))
    assert [values in [*LORA, *FREEZE] for values in some] == [True] * 4
    assert some != [*LORA, *FREEZE][:4]
    whole = configurations(study("searcher.type=grid", "budget.hours=1"))
    assert sorted(map(json.dumps, whole)) == sorted(map(json.dumps, [*LORA, *FREEZE]))
    assert whole != [*LORA, *FREEZE]


def test_random_trials_differ_and_a_small_space_is_used_up() -> None:
    found = configurations(study("trials=6"))
    assert len({json.dumps(values) for values in found}) == 6
    assert sorted(map(json.dumps, configurations(study()))) == sorted(map(json.dumps, [*LORA, *FREEZE]))


def test_more_trials_go_on_where_fewer_ended_and_a_further_key_changes_no_draw() -> None:
    few, many = (configurations(study(RATE, f"trials={trials}")) for trials in (5, 9))
    assert many[:5] == few
    wider = configurations(study(RATE, "space.tuner.rank={choice: [2, 4]}", "trials=5"))
    assert [values["train.learning_rate"] for values in wider] == [values["train.learning_rate"] for values in few]
    assert few != configurations(study(RATE, "trials=5", "searcher.seed=1"))


def test_draws_have_the_distribution_that_was_asked_for() -> None:
    space = "space={train.learning_rate: {loguniform: [1e-5, 1e-1]}, train.seed: {randint: [3, 5]}}"
    found = configurations(study(space, "trials=900"))
    rates = [values["train.learning_rate"] for values in found]
    assert 1e-5 <= min(rates) < 2e-5
    assert 5e-2 < max(rates) < 1e-1
    assert statistics.median(rates) == pytest.approx(1e-3, rel=0.5)
    seeds = collections.Counter(values["train.seed"] for values in found)
    assert sorted(seeds) == [3, 4, 5]
    assert min(seeds.values()) > 250


def test_of_billions_of_values_a_few_are_drawn_without_a_list_of_all() -> None:
    found = configurations(study("space={train.seed: {randint: [0, 4294967294]}}", "trials=3"))
    assert len({values["train.seed"] for values in found}) == 3


def test_grid_keys_take_turns_in_a_random_study() -> None:
    space = (
        "space={tuner.rank: {grid: [4, 8, 16]}, tuner.dora: {grid: [true, false]}, train.ema: {uniform: [0.5, 0.9]}}"
    )
    found = configurations(study(space, "trials=12"))
    counts = collections.Counter((values["tuner.rank"], values["tuner.dora"]) for values in found)
    assert counts == {(rank, dora): 2 for rank in (4, 8, 16) for dora in (True, False)}


def told_to_ray_tune(made: Study) -> list[dict[str, Any]]:
    space = param_space(made, dict(enumerate(configurations(made))))
    return [spec["config"] for _, spec in generate_variants({"config": space})]


@pytest.mark.parametrize("searcher", ["grid", "random"])
def test_ray_tune_makes_exactly_these_trials(searcher: str) -> None:
    made = study(f"searcher.type={searcher}", "trials=5")
    configs = told_to_ray_tune(made)
    assert [config["trial"] for config in configs] == [0, 1, 2, 3, 4]
    assert [made.configuration(config) for config in configs] == configurations(made)
    assert all(config.keys() == {"trial", *made.space} for config in configs)


TRANSFER = (
    "transfer_rank=true", "set.tuner.alpha=16", "trials=3",
    "space={tuner.rank: {choice: [8, 2, 32]}, train.learning_rate: {loguniform: [1e-4, 1e-2]}, "
    "tuner.freeze_depth: {choice: [2, 4], when: {tuner.rank: [2, 8]}}}",
)  # fmt: skip


def test_a_rate_is_searched_at_the_smallest_rank_and_carried_to_the_others() -> None:
    made = study(*TRANSFER)
    found = configurations(made)
    assert [values["tuner.rank"] for values in found] == [2, 2, 2]
    assert len({values["train.learning_rate"] for values in found}) == 3
    assert made.num_trials == 3 + 2
    best = found[1]
    assert carried(made, best) == [
        best | {"tuner.rank": 8},
        {"tuner.rank": 32, "train.learning_rate": best["train.learning_rate"]},
    ]
    assert made.recipe_of(carried(made, best)[0]).tuner.scale == 16 / 8
    grid = study(*TRANSFER, "searcher.type=grid", "space.train.learning_rate={grid: [1e-4, 1e-3]}", "trials=null")
    assert (len(configurations(grid)), grid.num_trials) == (2 * 2, 2 * 2 + 2)


def test_ray_tunes_own_generator_takes_lists_and_sections_whole() -> None:
    made = study("space={tuner: {choice: [{type: full}, {rank: 2, targets: [to_q]}]}}", "searcher.type=grid")
    configs = told_to_ray_tune(made)
    assert [made.recipe_of(config).tuner.type for config in configs] == ["full", "lora"]
    assert made.recipe_of(configs[1]).tuner.targets == ["to_q"]


def test_optuna_is_asked_for_a_key_only_where_it_applies() -> None:
    made = study("searcher={type: optuna, startup: 3}")
    searcher: Any = make_searcher(made)
    kinds = []
    for number in range(24):
        values = searcher.suggest(f"trial{number}")
        assert values in [*LORA, *FREEZE]
        kinds.append(values["tuner.type"])
        score = 1.0 if values.get("tuner.rank") == 8 else 0.1
        searcher.on_trial_result(f"trial{number}", {"prompt_accuracy": score, "training_iteration": 1})
        searcher.on_trial_complete(f"trial{number}", {"prompt_accuracy": score})
    params = [set(trial.params) for trial in searcher._ot_study.trials]
    assert params == [{"tuner.type", "tuner.rank" if kind == "lora" else "tuner.freeze_depth"} for kind in kinds]
    assert kinds[-12:].count("lora") > 8  # it has learned where the good ones are


def test_an_optuna_study_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    made = study("searcher.type=optuna", "space.train.learning_rate={loguniform: [1e-4, 1e-2]}")
    searcher, again = make_searcher(made), make_searcher(made)
    assert searcher is not None and again is not None
    for number in range(10):
        searcher.suggest(f"trial{number}")
        searcher.on_trial_complete(f"trial{number}", {"prompt_accuracy": 0.1 * number})
    searcher.save(str(tmp_path / "searcher"))
    again.restore(str(tmp_path / "searcher"))
    assert [again.suggest(name) for name in ("x", "y")] == [searcher.suggest(name) for name in ("x", "y")]


def test_optuna_weighs_several_metrics_and_is_told_labels() -> None:
    space = "space={tuner.targets: {choice: [attention, [to_q, to_k]]}, train.learning_rate: {qloguniform: [1, 9, 2]}}"
    made = study("searcher.type=optuna", "metric=[kid, prompt_accuracy, adapter_bytes]", space)
    searcher: Any = make_searcher(made)
    assert [direction.name for direction in searcher._ot_study.directions] == ["MINIMIZE", "MAXIMIZE", "MINIMIZE"]
    found = [searcher.suggest(f"trial{number}") for number in range(8)]
    assert {json.dumps(values["tuner.targets"]) for values in found} == {'"attention"', '["to_q", "to_k"]'}
    assert {values["train.learning_rate"] for values in found} <= {1.0, 3.0, 5.0, 7.0, 9.0}
    searcher.on_trial_complete("trial0", {"kid": 0.1, "prompt_accuracy": 0.5, "adapter_bytes": 7})
    assert [trial.values for trial in searcher._ot_study.best_trials] == [[0.1, 0.5, 7.0]]


def test_a_searcher_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_searcher(study()) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for overrides, message in (
        (["searcher.type=optuna"], "optuna: needs the package optuna; pip install 'gtl[search]'"),
        (["searcher.type=hyperopt"], "hyperopt: needs the package hyperopt; pip install hyperopt"),
        (["searcher.type=bohb", "scheduler.type=bohb"],
         "bohb: needs the package hpbandster; pip install hpbandster ConfigSpace"),
    ):  # fmt: skip
        made = study(*overrides)
        for ask in (make_searcher, partial(tune, name="x"), forecast, partial(forecast, cluster="1x1xH100")):
            with pytest.raises(UserError) as caught:
                ask(made)
            assert str(caught.value) == f"searcher.type: {message}"


def run(scheduler: Any, curves: dict[str, float], steps: range) -> dict[str, int]:
    """Report constant scores, one trial after another; the step at which each ended."""
    ended = {}
    for name, score in curves.items():
        trial = SimpleNamespace(trial_id=name)
        scheduler.on_trial_add(None, trial)
        for step in steps:
            ended[name] = step
            result = {"step": step, "training_iteration": 1, "prompt_accuracy": score}
            if scheduler.on_trial_result(None, trial, result) == scheduler.STOP:
                break
    return ended


def test_asha_stops_at_a_ninth_and_a_third_and_never_at_the_last_look() -> None:
    curves = {"a": 0.5, "b": 0.1, "c": 0.9, "d": 0.6, "e": 0.95}
    # d is better than most at 30, where c is the cut, and so on: c and e pass as the best of those before them.
    assert run(make_scheduler(study()), curves, range(0, 301, 30)) == {"a": 300, "b": 30, "c": 300, "d": 30, "e": 300}
    rungs = [milestone for milestone, _ in make_scheduler(study())._brackets[0]._rungs]
    assert rungs == [90, 30]
    assert run(make_scheduler(study()), dict(sorted(curves.items(), key=lambda c: -c[1])), range(0, 301, 30)) == {
        "e": 300, "c": 30, "d": 30, "a": 30, "b": 30,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "rungs"),
    [
        (["set.train.schedule.warmup=50"], [60]),
        (["scheduler.grace_period=10"], [90, 30, 10]),
        (["scheduler.grace_period=270"], [270]),
        (["scheduler.reduction_factor=2"], [120.0, 60.0]),
        (["set.evaluate.every=200"], [200]),
        (["set.train.steps=2000", "set.evaluate.every=1"], [666, 222]),
        (["space={train.steps: {choice: [100, 900]}}"], [270, 90]),
    ],
)
def test_asha_has_no_rung_in_the_second_half_but_the_one_that_was_asked_for(
    overrides: list[str], rungs: list[float]
) -> None:
    assert [milestone for milestone, _ in make_scheduler(study(*overrides))._brackets[0]._rungs] == rungs


def test_epochs_become_steps_first() -> None:
    made = study("set.train.epochs=3")
    with pytest.raises(ValueError, match="the recipe says epochs"):
        make_scheduler(made)
    assert make_scheduler(made, 450)._max_t == 225
    with pytest.raises(UserError, match=r"^evaluate.every: 30: nothing is measured before the last of 30 steps$"):
        make_scheduler(made, 30)


def test_how_many_steps_epochs_are_is_known_with_the_data(tmp_path: Path) -> None:
    entries = [Entry(Record(f"{i}.png", str(i), (64, 64), ("a",)), (64, 64), ("k",)) for i in range(20)]
    dataset = Dataset(Store(str(tmp_path)), entries, "images-codec-fp32", None, Cuts(1, False, 0))
    made = study("set={train.epochs: 3, data.validation: 0.1}", "space={train.batch_size: {choice: [4, 6]}}")
    assert most_steps([(made.recipe_of(values), dataset) for values in corners(made)]) == 3 * 5
    whole = study("space={train: {choice: [{steps: 700}, {epochs: 2}]}}")
    assert most_steps([(whole.recipe_of(values), dataset) for values in corners(whole)]) == 700
    assert make_scheduler(whole, 700)._max_t == 350
    with pytest.raises(ValueError, match="has to be given"):
        make_scheduler(whole)


def test_several_metrics_run_to_their_end() -> None:
    scheduler = make_scheduler(study("metric=[kid, adapter_bytes]"))
    assert type(scheduler).__name__ == "FIFOScheduler"


def test_hyperband_makes_brackets_of_looks() -> None:
    scheduler: Any = make_scheduler(study("scheduler.type=hyperband"))
    trials = [Trial("run", stub=True) for _ in range(17)]
    for trial in trials:
        scheduler.on_trial_add(None, trial)
    brackets = scheduler._hyperbands[0]
    assert [(bracket._n0, bracket._r0) for bracket in brackets] == [(3, 10), (5, 3), (9, 1)]
    # The bracket of full runs never stops one; in that of five, at the third look, all wait for the last.
    assert {scheduler.on_trial_result(None, trials[0], report(step)) for step in range(0, 301, 30)} == {"CONTINUE"}
    assert [scheduler.on_trial_result(None, trials[3], report(step)) for step in (0, 30, 60, 90)] == [
        "CONTINUE", "CONTINUE", "CONTINUE", "PAUSE",
    ]  # fmt: skip


def report(step: int) -> dict[str, Any]:
    return {"step": step, "prompt_accuracy": 0.5}


def test_a_population_changes_rates_inside_their_range() -> None:
    made = study("space={train.learning_rate: {loguniform: [1e-4, 1e-2]}, tuner.dropout: {choice: [0.0, 0.1]}}",
                 "scheduler={type: pbt, interval: 60}", "trials=8")  # fmt: skip
    scheduler: Any = make_scheduler(made)
    assert (scheduler._time_attr, scheduler._perturbation_interval, scheduler._quantile_fraction) == ("step", 60, 0.25)
    changed = mutations(made)
    assert changed["tuner.dropout"] == [0.0, 0.1]
    assert (changed["train.learning_rate"].lower, changed["train.learning_rate"].upper) == (1e-4, 1e-2)
    config = {"trial": 1, "train.learning_rate": 0.0125, "tuner.dropout": 0.1}
    assert keep_inside(made.space, config) == {**config, "train.learning_rate": 0.01}
    assert len(configurations(made)) == 8


class Controller:
    """What a population asks of Ray Tune's controller."""

    def __init__(self, members: list[Trial]) -> None:
        self.members, self.search_alg = members, None
        self._cached_trial_decisions: dict[str, str] = {}
        self.told: list[str] = []

    def get_trials(self) -> list[Trial]:
        return self.members

    def get_live_trials(self) -> list[Trial]:
        return [member for member in self.members if not member.is_finished()]

    def _schedule_trial_train(self, trial: Trial) -> None:
        self.told.append(trial.trial_id)


def make_population(**asked: Any) -> tuple[Any, Controller, list[tuple[str, str]]]:
    """A scheduler of four running trials, what it asks, and who exchanged: a poor one is paused then."""
    made = study("space={train.learning_rate: {loguniform: [1e-4, 1e-2]}}", "scheduler.type=pbt", "trials=4")
    scheduler: Any = make_scheduler(made, **asked)
    members = [Trial("run", stub=True, trial_id=name, config={"train.learning_rate": 1e-3}) for name in "abcd"]
    controller = Controller(members)
    exchanges: list[tuple[str, str]] = []

    def exchange(trial: Trial, _: Any, upper: list[Trial], lower: list[Trial]) -> None:
        exchanges.append((trial.trial_id, "good" if trial in upper else "poor" if trial in lower else ""))
        if trial in lower:
            trial.status = Trial.PAUSED

    scheduler._checkpoint_or_exploit = exchange
    for member in members:
        scheduler.on_trial_add(controller, member)
        member.status = Trial.RUNNING
    return scheduler, controller, exchanges


SCORES = {"a": 0.5, "b": 0.9, "c": 0.1, "d": 0.4}


def look(scheduler: Any, controller: Controller, step: int, names: str = "abcd") -> list[str]:
    members = [member for member in controller.members if member.trial_id in names]
    return [
        scheduler.on_trial_result(controller, one, {"step": step, "prompt_accuracy": SCORES[one.trial_id]})
        for one in members
    ]


def test_a_population_exchanges_when_all_are_there_and_not_at_the_end() -> None:
    scheduler, controller, exchanges = make_population()
    assert look(scheduler, controller, 30) == ["CONTINUE"] * 4  # an eighth of 300 steps is 37
    assert look(scheduler, controller, 60, "abc") == ["NOOP"] * 3
    assert (exchanges, controller.told) == ([], [])
    assert look(scheduler, controller, 60, "d") == ["CONTINUE"]
    assert exchanges == [("b", "good"), ("c", "poor")]
    assert controller.told == ["a", "b"]  # c starts again, and d goes on with its answer
    assert look(scheduler, controller, 300) == ["CONTINUE"] * 4
    assert len(exchanges) == 2


def test_nobody_waits_for_a_trial_that_failed() -> None:
    scheduler, controller, exchanges = make_population()
    look(scheduler, controller, 60, "abd")
    failed = controller.members[2]
    scheduler.on_trial_error(controller, failed)
    assert exchanges == [("b", "good"), ("d", "poor")] and controller.told == ["a", "b"]
    failed.status = Trial.ERROR
    assert look(scheduler, controller, 90, "ab") == ["NOOP", "NOOP"]
    controller.members[3].status = Trial.RUNNING
    assert look(scheduler, controller, 90, "d") == ["NOOP"]  # it is the poor one again, and paused
    assert exchanges[2:] == [("b", "good"), ("d", "poor")]


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, controller, exchanges = make_population()
    look(scheduler, controller, 60, "ab")
    scheduler.choose_trial_to_run(controller)
    assert controller.told == []
    monkeypatch.setattr("gtl.search.population.WAIT_S", 0.0)
    scheduler.choose_trial_to_run(controller)
    assert exchanges == [("b", "good"), ("a", "poor")] and controller.told == ["b"]
    assert look(scheduler, controller, 60, "cd") == ["CONTINUE"] * 2  # too late for this one


def test_a_population_without_room_takes_turns() -> None:
    scheduler, controller, exchanges = make_population(together=False)
    controller.members[3].status = Trial.PENDING
    assert look(scheduler, controller, 60, "a") == ["PAUSE"]
    assert exchanges == [("a", "")] and controller.told == []
