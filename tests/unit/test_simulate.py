"""Schedules of studies that were never run: small ones by hand, a large one in time, and a real one of Ray Tune."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from gtl.cli import main
from gtl.config import Study, parse_study
from gtl.config.load import dump_study
from gtl.search.forecast import START, forecast
from gtl.search.simulate import Schedule, Tempo, draws, lengths_of, middle, simulate
from gtl.types import UserError

ALL = {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}}


def make_study(trials: int, scheduler: str = "fifo", space: Any = None, train: Any = None, **asked: Any) -> Study:
    return parse_study({
        "recipe": {"model": {"source": "builtin:tiny"}, "data": {"source": "s3://photos", "resolution": 64},
                   "train": {"steps": 300, **(train or {})}, "evaluate": {"every": 30}},
        "space": space or ALL, "metric": "prompt_accuracy", "trials": trials, "scheduler": {"type": scheduler}, **asked,
    })  # fmt: skip


def test_three_trials_in_two_places() -> None:
    """Each takes 7 to start, 300 steps of 2 and ten looks of 5: 657. The third begins when the first is through."""
    found = simulate(make_study(3), Tempo(step=2, look=5, start=7), places=2)
    assert found == Schedule(seconds=2 * 657, busy=3 * 657, share=1.0)
    assert simulate(make_study(3), Tempo(2, 5, 7), places=1).seconds == 3 * 657
    assert simulate(make_study(3), Tempo(2, 5, 7), places=64).seconds == 657


def test_trials_of_other_lengths_are_placed_as_they_come() -> None:
    """100, 300 and 200 steps in two places: the third begins at 100, when the first ends, and ends with the second."""
    study = make_study(3, space={"train.steps": {"grid": [100, 300, 200]}}, searcher={"type": "grid"})
    assert lengths_of(study) == [100, 300, 200]
    assert simulate(study, Tempo(1, 0, 0), places=2) == Schedule(300, 600, 1.0)
    assert simulate(study, Tempo(1, 0, 0), places=1).seconds == 600


def test_a_stopped_trial_gives_its_place_to_the_next() -> None:
    """Three trials under asha, whose first rung is at 30 of 300 steps: each order's hours by hand, one place."""
    study = make_study(3, "asha")
    seen = {round(simulate(study, Tempo(1, 0, 0), 1, seed).seconds) for seed in range(30)}
    # The best first: 300 + 30 + 30. Worst first, then better ones: 900. Two whole ones else, or one of them only.
    assert seen == {360, 630, 900}
    for seed in range(5):
        found = simulate(study, Tempo(1, 0, 0), 1, seed)
        assert (found.busy, found.share) == (found.seconds, found.seconds / 900)


def test_several_orders_have_a_middle() -> None:
    found = draws(make_study(9, "asha"), Tempo(1, 0, 0), 3)
    assert len(found) == 20 and [one.seconds for one in found] == sorted(one.seconds for one in found)
    assert found[0].seconds < middle(found).seconds < found[-1].seconds <= 900
    assert len(draws(make_study(9), Tempo(1, 0, 0), 3)) == 1  # fifo is the same in every order


def test_carried_rates_come_behind_the_search() -> None:
    space = {**ALL, "tuner.rank": {"choice": [4, 8, 16]}}
    study = make_study(4, space=space, transfer_rank=True, set={"tuner.alpha": 16})
    assert study.num_trials == 6
    # Four in two places, then two more together.
    assert simulate(study, Tempo(1, 0, 0), 2) == Schedule(2 * 300 + 300, 6 * 300, 1.0)


def test_trials_that_wait_for_each_other_are_counted_whole() -> None:
    assert simulate(make_study(4, "hyperband"), Tempo(1, 0, 0), 2) == Schedule(600, 1200, 1.0)


def test_a_thousand_trials_on_sixty_four_places() -> None:
    study = make_study(1000, "asha", train={"steps": 3000})
    (one,) = draws(study, Tempo(2, 10, 60), 64)
    assert 0.15 < one.share < 0.5
    assert one.busy / 64 <= one.seconds < one.busy / 64 + 3000 * 2 + 100 * 10 + 60


def test_more_places_never_take_longer_and_more_steps_never_less() -> None:
    study = make_study(40)
    seconds = [simulate(study, Tempo(1, 2, 3), places).seconds for places in (1, 2, 4, 8, 40, 80)]
    assert seconds == sorted(seconds, reverse=True) and seconds[-1] == seconds[-2]
    assert simulate(study, Tempo(2, 2, 3), 4).seconds > seconds[2]


def on(study: Study, cluster: str) -> list[str]:
    return forecast(study, cluster).splitlines()


def test_a_study_on_a_cluster_that_is_not_there() -> None:
    lines = on(make_study(1000, "asha", set={"train.workers": 8}), "64x8xH100")
    assert "a trial: 8 workers with 1 CPUs and 1 GPUs, 64 at once" in lines
    (said,) = (line for line in lines if line.startswith("predicted: "))
    assert f"assumed: {START:g} s to start a trial" in said and "ZeRO stage 0" in said
    assert any(line.startswith("the study: ") and "GPU-hours" in line for line in lines)
    lines = on(make_study(16, budget={"gpu_hours": 0.01}), "2x2xA100")
    assert "a trial: 4 workers with 1 CPUs and 1 GPUs, 1 at once" in lines
    assert "budget.gpu_hours: 0.01: ends it before that" in lines
    assert lines[-1].startswith("train.workers: auto gives a trial all 4 GPUs; --set set.train.workers=1 runs 4 trials")


@pytest.mark.parametrize(
    ("cluster", "set_", "message"),
    [
        ("0x8xH100", {}, "--cluster 0x8xH100: expected NODESxGPUSxKIND, "),
        ("8x48GiB", {}, "--cluster 8x48GiB: of 48GiB only the memory is known; "),
        ("8xH100", {"train.workers": 9}, "train.workers: 9 workers with 1 GPU each need 9 GPUs; the cluster has 8 "),
        ("8xH100", {"train.gpus_per_worker": 0}, "train.gpus_per_worker: 0: trains on CPUs, of which --cluster says "),
    ],
)
def test_a_cluster_that_does_not_do_is_one_line(cluster: str, set_: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        forecast(make_study(4, set=set_), cluster)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_cluster_is_planned_for_and_not_trained_on(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    (tmp_path / "s.yaml").write_text(dump_study(make_study(4)))
    monkeypatch.setattr(sys, "argv", ["gtl", "tune", str(tmp_path / "s.yaml"), "--cluster", "8xH100"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: --cluster: 8xH100: is planned for, not trained on; add --dry-run\n"
