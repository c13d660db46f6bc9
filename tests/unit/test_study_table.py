"""How a study stands while it runs: the values, the table of them, and a terminal that shows it."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gtl.cli.study_table import StudyBar, render
from gtl.config import Study, parse_study
from gtl.search.record import Record, TrialRecord
from gtl.search.standing import Contender, Spent, Standing, expected_end, standing
from gtl.storage import Store
from tests.terminal import in_terminal, plain

ROOT = Path(__file__).resolve().parents[2]


def study(**changes: Any) -> Study:
    values: dict[str, Any] = {
        "recipe": {"model": {"source": "org/name"}, "data": {"source": "nowhere", "validation": 0.1},
                   "tuner": {"type": "lora"}, "train": {"steps": 200}, "evaluate": {"every": 20}},
        "space": {"train.learning_rate": {"loguniform": [1e-5, 1e-2]}, "tuner.rank": {"choice": [4, 8]}},
        "metric": "val_loss", "trials": 6, **changes,
    }  # fmt: skip
    return parse_study(values)


def record(asked: Study, folder: Path, *trials: tuple[str, int, list[float]]) -> Record:
    """Trials by state, steps and looks, the first at step 20."""
    made = Record(Store(folder), "study", "v1", asked)
    for number, (state, steps, values) in enumerate(trials):
        looks = [{"step": 20.0 * (i + 1), "val_loss": value} for i, value in enumerate(values)]
        metrics = {"val_loss": min(values)} if values else {}
        config = {"train.learning_rate": 0.001 * (number + 1), "tuner.rank": 8}
        name = f"{number:05d}"
        made.trials[name] = TrialRecord(
            name, config, "run", state, steps=steps, metrics=metrics, looks=looks, device_hours=steps / 1000
        )
    return made


def test_who_runs_who_leads_and_what_is_left(tmp_path: Path) -> None:
    asked = study()
    made = record(
        asked, tmp_path, ("finished", 200, [0.5, 0.25]), ("stopped", 40, [0.75, 0.7]), ("running", 60, [0.5, 0.3]),
        ("running", 0, []), ("failed", 0, []),
    )  # fmt: skip
    found = standing(asked, made, Spent(steps=300, device_hours=0.3, seconds=600.0, hours=0.5))
    assert (found.metric, found.keys) == ("val_loss", ("train.learning_rate", "tuner.rank"))
    assert found.counts == {"running": 2, "finished": 1, "stopped": 1, "failed": 1, "waiting": 1}
    assert (found.total, found.ended) == (6, 3)
    assert found.running == (
        Contender("00002", {"train.learning_rate": 0.003, "tuner.rank": 8}, 60, 200, 0.3),
        Contender("00003", {"train.learning_rate": 0.004, "tuner.rank": 8}, 0, 200, None),
    )
    assert found.best == Contender("00000", {"train.learning_rate": 0.001, "tuner.rank": 8}, 200, 200, 0.25)
    # Two who came farther than nowhere made 0.6 of their steps: so will who waits and who begins. The third has come
    # beyond the stopped one, and only one came farther.
    assert found.seconds_left == pytest.approx((0.6 * 200 + 0.6 * 200 + 200 - 60) * 600 / 300)


@pytest.mark.parametrize(
    ("budget", "left"),
    [({}, 1200.0), ({"hours": 0.6}, 360.0), ({"hours": 0.4}, 0.0), ({"gpu_hours": 0.3}, 200.0)],
)
def test_a_budget_ends_a_study_before_that(tmp_path: Path, budget: dict[str, float], left: float) -> None:
    asked = study(trials=4, budget=budget, scheduler={"type": "fifo"})
    made = record(asked, tmp_path, ("running", 100, [0.5]), ("running", 100, [0.5]))
    found = standing(asked, made, Spent(steps=200, device_hours=0.2, seconds=400.0, hours=0.5))
    # Who runs and who waits have 600 steps to go, at two seconds each; of the devices' budget 0.1 hours are left.
    assert found.seconds_left == pytest.approx(left)


def test_nothing_is_known_before_the_first_step_or_of_epochs(tmp_path: Path) -> None:
    nothing, some = Spent(0, 0.0, 9.0, 0.1), Spent(10, 0.1, 9.0, 0.1)
    asked = study()
    assert standing(asked, record(asked, tmp_path, ("running", 0, [])), nothing).seconds_left is None
    epochs = study(set={"train.steps": None, "train.epochs": 3}, scheduler={"type": "fifo"})
    found = standing(epochs, record(epochs, tmp_path, ("running", 10, [])), some)
    assert found.seconds_left is None and found.running[0].steps is None


def test_an_end_is_expected_from_those_that_came_farther() -> None:
    assert expected_end(0.0, []) == expected_end(0.5, [0.25, 0.5]) == 1.0
    assert expected_end(0.25, [0.25, 0.5, 1.0]) == 0.75


STANDING = Standing(
    "val_loss", ("train.learning_rate", "tuner.rank"),
    (Contender("00002", {"train.learning_rate": 0.003, "tuner.rank": 8}, 60, 200, 0.3),
     Contender("00003", {"train.learning_rate": 0.0004}, 7, None, None)),
    {"running": 2, "finished": 1, "waiting": 3}, 6,
    Contender("00000", {"train.learning_rate": 0.001, "tuner.rank": 8}, 200, 200, 0.25), 380.0,
)  # fmt: skip


def text(found: Standing, most: int = 40) -> str:
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(render(found, most))
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def test_the_table_word_for_word() -> None:
    assert text(STANDING) == textwrap.dedent("""\
        trials 1/6: 2 running, 1 finished, 3 waiting; 6 min left
        best   00000: val_loss 0.25  learning_rate 0.001, rank 8
        trial  learning_rate  rank  step    val_loss
        00002  0.003          8     60/200  0.3
        00003  0.0004               7""")
    assert text(STANDING, 1).splitlines()[3:] == ["00002  0.003          8     60/200  0.3", "and 1 more that run"]


def test_keys_that_end_alike_are_whole_and_brackets_are_no_markup() -> None:
    config = {"train.seed": 1, "data.seed": [2, "[bold]"]}
    one = Contender("00000", config, 1, 2, 0.5)
    found = Standing("kid", tuple(config), (one,), {"running": 1}, 1, one, None)
    assert text(found).splitlines() == [
        "trials 0/1: 1 running",
        "best   00000: kid 0.5  train.seed 1, data.seed [2, '[bold]']",
        "trial  train.seed  data.seed      step  kid",
        "00000  1           [2, '[bold]']  1/2   0.5",
    ]


def test_a_log_has_the_lines_that_it_had(capfd: pytest.CaptureFixture[str]) -> None:
    with StudyBar() as bar:
        bar("model", 0, 0, "builtin:tiny")
        bar.watch(STANDING)
        bar("trials", 1, 6, "2 running  best val_loss 0.25")
    assert capfd.readouterr().err.splitlines() == ["model builtin:tiny", "trials 1/6 2 running  best val_loss 0.25"]


SHOW = """
from dataclasses import replace
from gtl.cli.study_table import StudyBar
from tests.unit.test_study_table import STANDING
with StudyBar() as bar:
    bar("model", 0, 0, "builtin:tiny")
    for left in (380.0, 90.0):
        bar.watch(replace(STANDING, seconds_left=left))
        bar("trials", 1, 6, "2 running  best val_loss 0.25")
    bar("draw", 8, 8)
"""


def test_a_terminal_shows_one_table_that_changes() -> None:
    """In a real pseudo-terminal: the table is drawn over itself, and stays above what comes after the trials."""
    status, screen = in_terminal([sys.executable, "-c", SHOW], {"PYTHONPATH": str(ROOT)})
    assert status == 0, screen
    assert "2 running  best" not in screen, "the table has taken the place of the line"
    assert screen.count("6 min left") == 1 and screen.count("2 min left") >= 1
    first, last = screen.index("6 min left"), screen.rindex("2 min left")
    assert re.search(r"\x1b\[1A", screen[first:last]), "the cursor went up between the two"
    after = plain(screen[last:])
    assert "00002  0.003          8     60/200  0.3" in after
    assert after.index("00003") < after.index("draw") and "8/8" in after
