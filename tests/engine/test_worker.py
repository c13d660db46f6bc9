"""Pieces of a worker in a plain group: what a resumed run knows, what is compared, an export that has no room."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gtl.bench.models import write_dataset, write_model
from gtl.config import parse_recipe
from gtl.families import open_family
from gtl.storage import Store
from gtl.train import saver
from gtl.train.assemble import assemble
from gtl.train.checkpoint import complete
from gtl.train.course import finish, images_of, make_watch
from gtl.train.engine import Engine
from gtl.train.job import CHECKPOINTS, Job
from gtl.train.plan import TrainPlan
from gtl.train.worker import check_base, run
from gtl.types import UserError
from tests.engine import runs
from tests.engine.group import Group
from tests.engine.toy import make_train
from tests.tiny import make_sd

STEPS = 8


def make_job(folder: Path, **train: Any) -> Job:
    recipe = parse_recipe({
        "model": {"source": f"{folder}/model"},
        "tuner": {"type": "lora", "rank": 64, "targets": "attention"},
        "data": {"source": f"{folder}/images", "validation": 0.3},
        "train": {"steps": STEPS, **train},
        "evaluate": {"prompts": [], "every": 2},
        "storage": {place: f"{folder}/{place}" for place in ("runs", "cache", "registry")},
    })
    return Job(recipe.model_dump(mode="json"), "dog", "v1", "d" * 64, "b" * 64, "fp32")


def watch_again(folder: Path, job: Job, done: int) -> dict[str, float]:
    """The verdict of a run that goes on after so many steps, before it makes another."""
    family = write_model(folder / "model", "small")
    recipe = parse_recipe(job.recipe)
    images = images_of(recipe, write_dataset(Store(folder / "cache"), family, 4))
    plan = TrainPlan(steps=STEPS, stage=0, micro_batch=1, accumulation=1)
    trainee = assemble(recipe, "fp32")
    watch = make_watch(job, recipe, trainee, {}, plan, images, torch.device("cpu"), done, lambda step, is_best: None)
    return watch.verdict


def write_rows(run: Store, losses: dict[int, float]) -> None:
    rows = [{"step": 0, "val_loss": 0.5}, *({"step": step, "loss": 1.0, "val_loss": losses[step]} for step in losses)]
    run.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


@pytest.mark.parametrize(
    ("best", "done", "verdict"),
    [
        ([4], 6, {"val_loss": 2.0, "best_step": 4}),
        ([8], 6, {"val_loss": 3.0}),  # which took the place of 4 and is newer than the last checkpoint
        ([4, 8], 6, {"val_loss": 2.0, "best_step": 4}),  # cut off between the two
        ([8], 8, {"val_loss": 1.0, "best_step": 8}),
    ],
)
def test_a_best_is_known_if_its_weights_are_kept(
    solo: Group, tmp_path: Path, best: list[int], done: int, verdict: dict[str, float]
) -> None:
    job = make_job(tmp_path, early_stopping={"patience": 3})
    write_rows(job.run, {2: 4.0, 4: 2.0, 6: 3.0, 8: 1.0})
    for step in best:
        job.run.write(f"best/dog/{step:08d}/adapter.json", b"{}")
    assert solo.run(watch_again, tmp_path, job, done) == [verdict]
    assert job.run.folders("best/dog") == [f"{step:08d}" for step in best if step <= done]


@pytest.mark.parametrize(("done", "verdict"), [(8, {"val_loss": 1.0}), (7, {}), (0, {})])
def test_a_run_that_was_cut_off_at_its_end_knows_its_loss(
    solo: Group, tmp_path: Path, done: int, verdict: dict[str, float]
) -> None:
    job = make_job(tmp_path)
    write_rows(job.run, {6: 3.0, 8: 1.0})
    assert solo.run(watch_again, tmp_path, job, done) == [verdict]


def test_a_worker_that_has_another_model_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    family = open_family(str(make_sd(tmp_path / "model")))
    job = replace(make_job(tmp_path), base=family.fingerprint())
    check_base(family, job)
    other = replace(job, base="0" * 64)
    with pytest.raises(UserError, match=rf"^model\.source: {tmp_path}/model: its files on the worker .* \(0{{12}}\); "):
        check_base(family, other)
    monkeypatch.setenv("LOCAL_RANK", "1")  # its neighbour reads the files
    check_base(family, other)


def export_to(folder: Path, job: Job, disk: Path) -> str:
    """What `finish` says when it exports through a small disk."""
    recipe = parse_recipe(job.recipe)
    trainee = assemble(recipe, "fp32")
    engine = Engine(
        trainee.players["denoiser"], trainee.parameters, make_train(), stage=0, micro_batch=1, accumulation=1,
        device="cpu", total_steps=4,
    )  # fmt: skip
    tempfile.tempdir = str(disk)
    try:
        finish(job, recipe, trainee, {"denoiser": engine}, {})
    except UserError as error:
        return str(error)
    finally:
        tempfile.tempdir = None
    return ""


def test_an_export_on_a_full_disk_is_one_line(solo: Group, tmp_path: Path, small_disk: Path) -> None:
    make_sd(tmp_path / "model")
    (small_disk / "full").write_bytes(bytes(1 << 19))
    (said,) = solo.run(export_to, tmp_path, make_job(tmp_path), small_disk)
    assert said.startswith(f"{small_disk}/")
    assert said.endswith(": the disk is full; free some space and go on with --resume")


def run_with_long_writes(job: Job, ask: int) -> None:
    """Every write counts as one that begins early, and somebody asks for a save behind a step."""
    brief, saver.BRIEF_S = saver.BRIEF_S, 0.0
    try:
        run(job, torch.device("cpu"), lambda row: "save" if row["step"] == ask else None)
    finally:
        saver.BRIEF_S = brief


@pytest.mark.parametrize(("waits", "saved"), [(("val_loss",), [4, 6, 8, 12, 14]), ((), [4, 6, 9, 12, 14])])
def test_a_run_that_others_go_on_from_is_saved_at_its_looks(
    solo: Group, tmp_path: Path, waits: tuple[str, ...], saved: list[int]
) -> None:
    job = replace(runs.make_job(tmp_path, steps=14, checkpoints={"every": 4, "keep": 9}), waits=waits)
    job.recipe["data"]["validation"] = 0.3
    job.recipe["evaluate"]["every"] = 4
    solo.run(run_with_long_writes, job, 5)
    assert complete(job.run, CHECKPOINTS) == [f"{CHECKPOINTS}/{step:08d}" for step in saved]
