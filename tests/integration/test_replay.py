"""What a dry run says of a study's schedule, against Ray Tune itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gtl.config import parse_study
from gtl.search.forecast import forecast
from gtl.search.replay import replay
from gtl.search.schedule import STEP, make_scheduler
from gtl.search.tuning import quiet_tune
from tests.tiny import make_sd, write_pictures


def make_study(folder: Path, trials: int, steps: int) -> Any:
    return parse_study({
        "recipe": {
            "model": {"source": str(folder / "model")},
            "data": {"source": str(folder / "images"), "resolution": 64, "validation": 0.25},
            "train": {"steps": steps, "batch_size": 4, "workers": 1}, "evaluate": {"every": 30, "steps": 2},
            "storage": {name: str(folder / name) for name in ("runs", "cache", "registry")},
        },
        "space": {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}}, "metric": "val_loss", "trials": trials,
        "concurrency": 2,
    })  # fmt: skip


def test_a_dry_run_measures_and_simulates(ray_cluster: Any, tmp_path: Path) -> None:
    make_sd(tmp_path / "model")
    write_pictures(tmp_path / "images", [(64, 64)] * 8)
    lines = forecast(make_study(tmp_path, 12, 300)).splitlines()
    said = {line.partition(":")[0]: line for line in lines if ":" in line}
    assert said["a trial"] == "a trial: 1 worker with 1 CPUs, 2 at once"
    assert said["measured"].endswith(" s a look") and " s a step of 4 images, " in said["measured"]
    assert said["a whole trial"].endswith(" of them to start") and " worker-hours, " in said["the study"]
    assert " of their steps, simulated for trials " in said["asha stops trials early"]
    assert said["asha stops trials early"].endswith("in 20 random orders")


def test_ray_tune_itself_makes_the_same_schedule(ray_cluster: Any, tmp_path: Path) -> None:
    """One trial after the other, as many steps of each as the replay says."""
    from ray import tune
    from ray.tune import RunConfig

    study, worth = make_study(tmp_path, 5, 300), [0.3, 0.5, 0.1, 0.4, 0.7]
    steps = list(range(30, 301, 30))

    def trial(config: dict[str, Any]) -> None:
        for step in steps:
            tune.report({STEP: step, "val_loss": -worth[config["number"]]})

    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}), param_space={"number": tune.grid_search(list(range(5)))},
        tune_config=tune.TuneConfig(scheduler=make_scheduler(study), max_concurrent_trials=1),
        run_config=RunConfig(storage_path=str(tmp_path), verbose=0),
    )  # fmt: skip
    with quiet_tune():  # or its handler of Ctrl+C stays in this process
        real = {result.config["number"]: result.metrics[STEP] for result in tuner.fit()}
    curves = {str(number): [(step, -value) for step in steps] for number, value in enumerate(worth)}
    keys = (STEP, "val_loss")
    found = replay(make_scheduler(study), curves, list("01234"), 1, keys, "min", {})
    assert sum(real.values()) == found.spent < 1500
    assert real == {0: 300, 1: 300, 2: 30, 3: 90, 4: 300}
