"""What a run writes while it goes on: TensorBoard reads back the values of metrics.jsonl and of scores that come late.

And what a disk that is full makes of it.
"""

from __future__ import annotations

import datetime
import os
import threading
import time
import uuid
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gtl.evaluate.result import Evaluation, Sampling, Score
from gtl.storage import Store
from gtl.train.curves import FOLDER, Curves
from gtl.train.scores import forget_scores, write_scores
from gtl.train.track import Tracker, read_rows, write_hparams
from gtl.types import UserError

ROWS = [{"step": step, "loss": 1 / step, "learning_rate": 1e-4 * step, "device": "cpu"} for step in range(1, 6)]
LOOK = {"step": 4, "val_loss": 0.3}


def events(folder: Path, key: str = "tensorboard") -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every scalar in a run's TensorBoard folder."""
    found = EventAccumulator(str(folder / key)).Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def metrics(run: Store) -> dict[str, list[tuple[int, float]]]:
    """The same of its metrics.jsonl; TensorBoard keeps single precision."""
    rows, found = read_rows(run), {}
    for name in ("loss", "learning_rate", "val_loss"):
        found[name] = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
    return found


@pytest.fixture(params=["disk", "bucket"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return Store(tmp_path / "run")
    return Store(request.getfixturevalue("s3")).sub(uuid.uuid4().hex)


def test_tensorboard_has_the_values_of_the_metrics(run: Store, tmp_path: Path) -> None:
    with Tracker(run) as tracker:
        for row in [*ROWS[:4], LOOK, ROWS[4]]:
            tracker.log(row)
    assert read_rows(run) == [*ROWS[:4], LOOK, ROWS[4]]
    for key, _, _ in run.list("tensorboard"):
        run.download(key, tmp_path / "copy" / key)
    found = events(tmp_path / "copy")
    assert found == metrics(run)
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4, 5]


def test_a_resumed_run_has_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Store(tmp_path)
    with Tracker(run) as tracker:
        for row in ROWS:
            tracker.log(row)
    later = time.time() + 60
    monkeypatch.setattr("time.time", lambda: later)  # files of events are named by the second
    with Tracker(run, first_step=3) as tracker:  # steps 4 and 5 are done again
        for row in ROWS[3:]:
            tracker.log({**row, "loss": 9.0})
    losses = [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 9.0), (5, 9.0)]
    assert [(row["step"], row["loss"]) for row in read_rows(run)] == losses
    assert events(tmp_path)["loss"] == metrics(run)["loss"]


@pytest.mark.parametrize("full", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_is_a_line_about_the_run(tmp_path: Path, full: str) -> None:
    said: list[str] = []

    def log() -> None:
        tracker = Tracker(Store(tmp_path))
        open_files = [path for path in Path("/proc/self/fd").iterdir() if path.exists()]
        (number,) = (int(path.name) for path in open_files if path.resolve().is_relative_to(tmp_path / full))
        sink = os.open("/dev/full", os.O_WRONLY)
        os.dup2(sink, number)
        os.close(sink)
        for attempt in (lambda: [tracker.log({"step": step, "loss": 1.0}) for step in range(30)], tracker.close):
            try:
                attempt()
            except UserError as error:
                said.append(str(error))

    thread = threading.Thread(target=log, daemon=True)  # which need not come back, if somebody waits for ever
    thread.start()
    thread.join(20)
    line = f"{tmp_path / 'metrics.jsonl'}: the disk is full; free some space and go on with --resume"
    assert not thread.is_alive()
    assert said == [line] * 2


def score(run: Store, step: int, kid: float) -> None:
    """Leave what was measured of a look, a minute a step after the first."""
    how = Sampling(
        prompts=["a dog"], negative_prompt="", seed=0, steps=2, guidance=1, height=8, width=8, dtype="fp32"
    )  # fmt: skip
    number = Score(
        value=kid, low=None, high=None, higher_is_better=False, num_fake=1, num_real=1, extractor="x", resize="x",
        dtype="fp32", fake=[0],
    )  # fmt: skip
    made = datetime.datetime.fromtimestamp(60 * step, datetime.timezone.utc)
    write_scores(run, Evaluation(
        adapter="dog@1", step=step, base={}, dataset="d", images=1, held_out=0, sampling=how, scores={"kid": number},
        samples=None, created=made,
    ), None)  # fmt: skip


def test_scores_that_come_late_are_curves_beside_the_workers(run: Store, tmp_path: Path) -> None:
    curves = Curves(run)
    with Tracker(run) as tracker:
        for row in ROWS:
            tracker.log(row)
            if row["step"] in (4, 5):  # each after its step, while the workers' file goes on
                score(run, int(row["step"]) - 2, float(row["step"]))
                curves.add(int(row["step"]) - 2)
    for key, _, _ in run.list("tensorboard"):
        run.download(key, tmp_path / "copy" / key)
    assert events(tmp_path / "copy", FOLDER) == {"kid": [(2, 4.0), (3, 5.0)]}
    times = EventAccumulator(str(tmp_path / "copy" / FOLDER)).Reload().Scalars("kid")
    assert [event.wall_time for event in times] == [120, 180]
    assert [step for step, _ in events(tmp_path / "copy")["loss"]] == [1, 2, 3, 4, 5]
    curves.close()


def test_looks_that_are_scored_again_are_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Store(tmp_path)
    curves = Curves(run)
    for step in (2, 4, 6):
        score(run, step, 1.0)
        curves.add(step)
    forget_scores(run, 2)  # workers were lost, and went on from step 2
    score(run, 4, 0.5)
    curves.add(4)
    assert events(tmp_path, FOLDER) == {"kid": [(2, 1.0), (4, 0.5)]}
    curves.close()
    later = time.time() + 60
    monkeypatch.setattr("time.time", lambda: later)  # files of events are named by the second
    score(run, 8, 0.25)  # by a launcher that ended before it was shown
    score(run, 3, 0.75)
    resumed = Curves(run)
    resumed.add(3)
    score(run, 9, 0.125)
    resumed.add(9)
    resumed.close()
    assert events(tmp_path, FOLDER) == {"kid": [(2, 1.0), (3, 0.75), (4, 0.5), (8, 0.25), (9, 0.125)]}


def test_a_run_has_no_curves_beside_it_before_the_first_look(tmp_path: Path) -> None:
    Curves(Store(tmp_path)).close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_reads_what_a_trial_was(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams.metadata import parse_experiment_plugin_data, parse_session_start_info_plugin_data

    run = Store(tmp_path)
    with Tracker(run) as tracker:
        tracker.log(LOOK)
    config = {"train.learning_rate": 2e-3, "tuner.rank": 8, "tuner.dora": True, "tuner.train": ["unet"]}
    for _ in range(2):  # a study that goes on says it again
        write_hparams(run, config, ["val_loss"])
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("val_loss")] == [(4, pytest.approx(0.3))]
    told = found.PluginTagToContent("hparams")
    start = parse_session_start_info_plugin_data(told["_hparams_/session_start_info"]).hparams
    assert {name: getattr(start[name], str(start[name].WhichOneof("kind"))) for name in start} == {
        **config, "tuner.train": "['unet']",
    }  # fmt: skip
    experiment = parse_experiment_plugin_data(told["_hparams_/experiment"])
    assert [metric.name.tag for metric in experiment.metric_infos] == ["val_loss"]
