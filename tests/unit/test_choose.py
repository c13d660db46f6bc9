"""Which trials are best, by one metric and by several, and how sure that is."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from gtl.config import parse_study
from gtl.evaluate.estimate import estimate, estimate_share
from gtl.evaluate.result import Evaluation, Sampling, make_score
from gtl.search.choose import Outcome, crowding, front, rank, top, winner
from gtl.search.record import Record, TrialRecord
from gtl.search.study import choose
from gtl.search.trial import Place
from gtl.session import Cluster
from gtl.storage import Store
from gtl.types import UserError, quiet

UP: Any = {"prompt_accuracy": "max"}
BOTH: Any = {"prompt_accuracy": "max", "adapter_bytes": "min"}
FACTS = {"extractor": "builtin:reader", "resize": "as it is drawn", "dtype": "exact"}


def outcome(trial: str, accuracy: float | None, size: float | None = None) -> Outcome:
    return Outcome(trial, {"prompt_accuracy": accuracy, "adapter_bytes": size})


def names(outcomes: list[Outcome]) -> str:
    return "".join(outcome.trial for outcome in outcomes)


def evaluation(right: list[int], metric: str = "prompt_accuracy", **changes: Any) -> Evaluation:
    values = torch.tensor(right, dtype=torch.float64)
    if metric == "prompt_accuracy":
        found = estimate_share(metric, float(values.mean()), values, len(values))
    else:
        found = estimate(metric, float(values.mean()), values)
    how = {"prompts": ["a"], "negative_prompt": "", "seed": 7, "steps": 9, "guidance": 3.0, "height": 64, "width": 64}
    return Evaluation(
        adapter="x@1", base={}, dataset="d", images=9, held_out=0, samples="s",
        sampling=Sampling.model_validate({**how, "dtype": "fp32", **changes}),
        scores={metric: make_score(found, FACTS)},
    )  # fmt: skip


def test_one_metric_ranks_in_its_direction_and_leaves_out_what_was_not_measured() -> None:
    trials = [
        outcome("a", 0.5), outcome("b", None), outcome("c", 0.7), outcome("d", math.nan), outcome("e", 0.5),
        outcome("f", math.inf), Outcome("g", {}),
    ]  # fmt: skip
    assert names(rank(trials, UP)) == "cae"  # equal ones in their order
    assert names(rank(trials, {"prompt_accuracy": "min"})) == "aec"
    assert names(top(trials, UP, 2)) == "ca"
    assert names(top(trials, UP, 9)) == "cae"
    assert names(front(trials, UP)) == "c"
    assert rank([], UP) == top([], BOTH, 3) == front([], BOTH) == []


def test_a_front_holds_what_nothing_beats_in_both() -> None:
    trials = [
        outcome("a", 0.9, 50), outcome("b", 0.8, 20), outcome("c", 0.8, 30), outcome("d", 0.5, 10),
        outcome("e", 0.8, 20), outcome("f", 0.4, 10), outcome("g", 0.95, math.nan), outcome("h", 0.4, 60),
    ]  # fmt: skip
    assert names(front(trials, BOTH)) == "abed"  # c is larger than b, f worse than d, and g was never weighed
    assert names(rank(trials, BOTH)) == "abed" + "cf" + "h"
    assert names(front(trials, {**BOTH, "adapter_bytes": "max"})) == "ah"


def test_fronts_agree_with_their_definition_on_random_numbers() -> None:
    rng = random.Random(0)
    trials = [outcome(str(i), rng.randrange(8), rng.randrange(8)) for i in range(60)]
    found = front(trials, BOTH)
    for one in trials:
        beaten = any(
            other.gains(BOTH)[0] >= one.gains(BOTH)[0] and other.gains(BOTH)[1] >= one.gains(BOTH)[1]
            and other.gains(BOTH) != one.gains(BOTH) for other in trials
        )  # fmt: skip
        assert (one in found) is not beaten
    assert sorted(rank(trials, BOTH), key=lambda o: o.trial) == sorted(trials, key=lambda o: o.trial)


def test_a_choice_from_a_front_spans_it() -> None:
    line = [
        outcome(name, 1.0 - size / 100, 100.0 - size) for name, size in zip("abcde", (0, 1, 2, 50, 100), strict=True)
    ]
    assert crowding(line, BOTH) == pytest.approx([math.inf, 0.04, 0.98, 1.96, math.inf])
    assert names(top(line, BOTH, 3)) == "ade"
    assert names(top([*line, outcome("z", 0.1, 200)], BOTH, 6)) == "abcdez"


def test_a_clear_winner_has_its_interval_against_the_runner_up() -> None:
    good, poor = [1] * 30 + [0] * 2, [0] * 20 + [1] * 12
    found = winner({"a": evaluation(poor), "b": evaluation(good)}, "prompt_accuracy")
    assert (found.trial, found.runner_up, found.is_clear, found.tied) == ("b", "a", True, ())
    assert found.difference is not None and found.difference.low is not None and found.difference.high is not None
    assert found.difference.value == pytest.approx(18 / 32)
    assert 0 < found.difference.low < 18 / 32 < found.difference.high < 1
    assert str(found).startswith("b: prompt_accuracy 0.9375 (") and ", better than a: +0.5625 (" in str(found)


def test_a_winner_by_chance_is_called_that() -> None:
    first = [1] * 20 + [0] * 12
    second, third = [0, *first[1:]], [0] * 32
    found = winner({"c": evaluation(third), "b": evaluation(second), "a": evaluation(first)}, "prompt_accuracy")
    assert (found.trial, found.runner_up, found.is_clear, found.tied) == ("a", "b", False, ("b",))
    assert ", not to be told from b: +0.03125 (" in str(found)


def test_lower_may_be_better_and_equal_ones_stay_in_order() -> None:
    low, high = ([value + i % 3 for i in range(16)] for value in (1, 9))
    found = winner({"a": evaluation(high, "kid"), "b": evaluation(low, "kid"), "c": evaluation(low, "kid")}, "kid")
    assert (found.trial, found.runner_up, found.is_clear, found.tied) == ("b", "c", False, ("c",))
    assert winner({"a": evaluation(high, "kid"), "b": evaluation(low, "kid")}, "kid").is_clear


def test_a_winner_alone_has_nobody_to_be_compared_with() -> None:
    found = winner({"a": evaluation([1] * 16)}, "prompt_accuracy")
    assert (found.runner_up, found.difference, found.tied, found.is_clear) == (None, None, (), False)
    assert str(found) == "a: prompt_accuracy 1 (0.8064 to 1)"


def test_too_few_samples_make_no_clear_winner() -> None:
    found = winner({"a": evaluation([0] * 4), "b": evaluation([1] * 4)}, "prompt_accuracy")
    assert (found.trial, found.is_clear, found.tied) == ("b", False, ("a",))
    assert "(none)" in str(found)


def test_trials_may_differ_in_the_steps_of_their_pictures() -> None:
    found = winner({"a": evaluation([1] * 16, steps=25), "b": evaluation([0] * 16, steps=2)}, "prompt_accuracy")
    assert (found.trial, found.is_clear) == ("a", True)


def test_what_cannot_be_compared_is_refused() -> None:
    one, other = evaluation([1] * 16), evaluation([0] * 16, seed=8)
    with pytest.raises(UserError, match="differ in seed; evaluate both with one recipe"):
        winner({"a": one, "b": other}, "prompt_accuracy")
    with pytest.raises(UserError, match="^metric: kid: no trial that was measured again has it; see evaluate.metrics$"):
        winner({"a": one}, "kid")


@pytest.mark.parametrize("confirmed", [0, 3])
def test_nothing_is_chosen_where_nothing_could_be_measured(confirmed: int, tmp_path: Path) -> None:
    study = parse_study({
        "recipe": {"model": {"source": "org/name"}, "data": {"source": "nowhere"}}, "metric": "kid",
        "space": {"train.learning_rate": {"choice": [1e-3]}}, "confirm": {"top": confirmed},
        "scheduler": {"type": "fifo"},
    })  # fmt: skip
    record = Record(Store(str(tmp_path)), "study", "v1", study)
    record.trials["00000"] = TrialRecord("00000", {}, "run", "finished", looks=[{"step": 9.0, "kid": math.nan}])
    place = Place(study.model_dump(mode="json"), str(tmp_path), "v1")
    with pytest.raises(UserError, match=r"^metric: kid: no trial that ran to its end has a finite number of each$"):
        choose(study, place, record, Cluster(1, 0), quiet)
