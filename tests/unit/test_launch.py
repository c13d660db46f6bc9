"""What the launcher decides without a cluster: which run to go on with, by which recipe, and what it passes on."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

import gtl.train.launch as launch
from gtl.adapters import Card, Registry
from gtl.adapters.card import Base
from gtl.config import Recipe, parse_recipe
from gtl.config.load import dump_recipe
from gtl.config.names import Reference
from gtl.session import Cluster
from gtl.storage import Store
from gtl.train.board import Board
from gtl.train.launch import follow, train_once
from gtl.train.resources import Resources, choose_resources, describe
from gtl.train.resume import go_on, pin_init, unfinished, was_of
from gtl.types import UserError
from tests.tiny import make_sd


def make_recipe(folder: Path, init: str | None = None, **train: Any) -> Recipe:
    return parse_recipe({
        "model": {"source": str(folder / "model")},
        "tuner": {"type": "lora", "init": init},
        "data": {"source": str(folder / "images")},
        "train": train,
        "storage": {name: str(folder / name) for name in ("runs", "cache", "registry")},
    })


def publish(folder: Path, version: str) -> Registry:
    files = folder / "files"
    files.mkdir(exist_ok=True)
    (files / "adapter_model.safetensors").write_bytes(b"weights")
    registry = Registry(folder / "registry")
    base = Base(source="some/model", fingerprint="f" * 64, family="sd")
    registry.publish("dog", version, files, Card(name="dog", version=version, base=base, tuner={"type": "lora"}))
    return registry


def test_a_run_is_started_once_and_gone_on_with_by_its_own_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | bool] = []

    def train(recipe: Recipe, name: str, *, resume: bool | str = False, progress: Any = None) -> Reference:
        asked.append(resume)
        if resume:
            go_on(Store(f"{recipe.storage.runs}/{name}"), str(resume), recipe)
        return Reference(name, "v", 1.0)

    monkeypatch.setattr(launch, "train", train)
    make_sd(tmp_path / "model")
    runs, mine = Store(tmp_path / "runs" / "run"), make_recipe(tmp_path)
    train_once(mine, "run")
    runs.write("v1/recipe.yaml", dump_recipe(mine).encode())
    runs.write("v2/recipe.yaml", dump_recipe(make_recipe(tmp_path, learning_rate=0.5)).encode())
    train_once(mine, "run")
    assert unfinished(runs) == "v2"
    # Another model at the same place: what was trained on the old one is no part of the new one.
    manifest = {"schema": 1, "step": 5, "players": {}, "files": {}, "base": "0" * 64}
    runs.write("v1/checkpoints/00000005/manifest.json", json.dumps(manifest).encode())
    train_once(mine, "run")
    assert asked == [False, "v1", False]
    assert unfinished(runs) == "v1", "a later start that failed has nothing to go on with"
    with pytest.raises(UserError, match=r"v2 was started with other values of train\.learning_rate; put them back"):
        go_on(runs, "v2", mine)


@pytest.mark.parametrize("init", ["dog", "dog@prod"])
def test_a_resumed_run_starts_from_what_it_was_started_from(tmp_path: Path, init: str) -> None:
    publish(tmp_path, "v1").promote("dog@v1", "prod")
    recipe, runs = make_recipe(tmp_path, init), Store(tmp_path / "runs" / "run")
    begun = pin_init(recipe)
    assert begun.tuner.init == "dog@v1"
    runs.write("r1/recipe.yaml", dump_recipe(begun).encode())
    publish(tmp_path, "v2").promote("dog@v2", "prod")
    assert go_on(runs, "r1", recipe) == begun
    assert was_of(runs, "r1", recipe, "f" * 64)
    assert pin_init(recipe).tuner.init == "dog@v2"
    other = make_recipe(tmp_path, "dog@v2")
    assert not was_of(runs, "r1", other, "f" * 64)
    with pytest.raises(UserError, match=r"other values of tuner\.init; put them back"):
        go_on(runs, "r1", other)


@pytest.mark.parametrize("stopping", [None, {"patience": 3}])
def test_when_a_run_looks_may_change_unless_looks_decide_what_it_publishes(tmp_path: Path, stopping: Any) -> None:
    values = make_recipe(tmp_path).model_dump(mode="json")
    values["data"]["validation"], values["train"]["early_stopping"] = 0.2, stopping
    recipe, runs = parse_recipe(values), Store(tmp_path / "runs")
    runs.write("r1/recipe.yaml", dump_recipe(recipe).encode())
    values["evaluate"] |= {"every": recipe.evaluate.every + 1, "steps": recipe.evaluate.steps + 1}
    if stopping is None:
        assert go_on(runs, "r1", parse_recipe(values)) == parse_recipe(values)
        return
    message = r"other values of evaluate\.every; put them back \(evaluate\.steps may differ\)"
    with pytest.raises(UserError, match=message):
        go_on(runs, "r1", parse_recipe(values))


@pytest.mark.parametrize(("data", "said"), [(b"model: [", "not valid YAML"), (b"\xff", "not text in UTF-8")])
def test_a_damaged_recipe_of_a_run_is_one_line(tmp_path: Path, data: bytes, said: str) -> None:
    runs = Store(tmp_path / "runs")
    runs.write("r1/recipe.yaml", data)
    with pytest.raises(UserError, match=f"^recipe {tmp_path}/runs/r1/recipe.yaml: {said}"):
        go_on(runs, "r1", make_recipe(tmp_path))


def test_what_comes_last_is_passed_on() -> None:
    board, told, next_one = Board(), [], threading.Event()

    def work() -> None:
        board.push({"step": 1})
        next_one.wait(10)
        board.push({"step": 2})

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    for rows in follow(thread, board.take):
        told += [row["step"] for row in rows]
        next_one.set()
        thread.join()  # a slow service: all ends while it is told
    assert told == [1, 2]


@pytest.mark.parametrize(
    ("workers", "gpus", "resolved"),
    [("auto", 0, 1), ("auto", 8, 8), (3, 8, 3), ([1, 4], 2, (1, 4)), ([2, 9], 0, (2, 9))],
)
def test_workers_are_as_many_as_asked_or_a_range(tmp_path: Path, workers: Any, gpus: int, resolved: Any) -> None:
    recipe = make_recipe(tmp_path, workers=workers)
    assert choose_resources(recipe, Cluster(cpus=9, gpus=gpus)).workers == resolved


def test_the_fewest_workers_have_to_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^train\.workers: 3 workers with 1 GPU each need 3 GPUs"):
        choose_resources(make_recipe(tmp_path, workers=[3, 8]), Cluster(cpus=8, gpus=2))
    with pytest.raises(UserError, match=r"^train\.workers: 1 workers with 1 GPU each need 1 GPUs; the cluster has 0 "):
        choose_resources(make_recipe(tmp_path, workers="auto", gpus_per_worker=1), Cluster(cpus=8, gpus=0))


@pytest.mark.parametrize("workers", [3, [2, 4]])
def test_workers_are_whole_groups_of_hpz(tmp_path: Path, workers: Any) -> None:
    recipe = make_recipe(tmp_path, workers=workers, zero={"stage": 3, "hpz": 2})
    message = r"^train\.zero\.hpz: 2: has to divide the number of workers, which can be 3$"
    with pytest.raises(UserError, match=message):
        choose_resources(recipe, Cluster(cpus=8, gpus=0))


@pytest.mark.parametrize(
    ("workers", "message"), [([4, 1], "[fewest, most], the smaller one first"), ([0, 2], "greater than or equal to 1")]
)
def test_a_wrong_range_of_workers_is_one_line(tmp_path: Path, workers: list[int], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_recipe(tmp_path, workers=workers)
    assert "train.workers" in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_becomes_of_a_batch_is_said() -> None:
    def say(workers: int | tuple[int, int], batch_size: int, gpus: int = 0, **train: Any) -> str:
        values = {"model": {"source": "a/b"}, "data": {"source": "c"}, "train": {"batch_size": batch_size, **train}}
        return describe(parse_recipe(values), Resources(workers, gpus, 1, "fp32"))

    assert say(2, 8) == "2"
    assert say((1, 2), 8) == "1 to 2"
    assert say((1, 4), 7) == "1 to 4, whose batches of 7 are filled up with up to 2 repeats that do not count"
    assert say(3, 4) == "3, whose batches of 4 are filled up with 2 repeats that do not count"
    assert say(3, 8) == "3, whose batches of 8 are filled up with 1 repeat that does not count"
    # 11 for each, in 3 passes of 4
    assert say(3, 32, micro_batch=4) == "3, whose batches of 32 are filled up with 4 repeats that do not count"
    assert say(3, 32, 1, micro_batch=4) == "3, whose batches of 32 are filled up with 4 repeats that do not count"
    assert say(3, 32, 1) == "3, whose batches of 32 are filled up with at least 1 repeat that does not count"
