"""Studies on a real Ray cluster: trials that end, are stopped, fail and take over from one another."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gtl.adapters import Registry
from gtl.config import load_study
from gtl.config.load import parse_study
from gtl.config.study import Study
from gtl.evaluate.held_out import validate
from gtl.families import denoising, open_family
from gtl.generate.spread import Model, Origin, Published
from gtl.search.cost import inference_tflops
from gtl.search.record import Record
from gtl.search.space import configurations
from gtl.search.standing import Standing
from gtl.search.study import FRESH, tune
from gtl.types import UserError, quiet
from tests.terminal import in_terminal, plain
from tests.tiny import make_sd, write_pictures

DIVERGING = 1e30


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and twelve captioned pictures."""
    folder = tmp_path_factory.mktemp("tune")
    make_sd(folder / "model")
    write_pictures(folder / "images", [(64, 64)] * 12)
    return folder


def make_values(place: Path, space: dict[str, Any], steps: int, **asked: Any) -> dict[str, Any]:
    return {
        "recipe": {
            "model": {"source": str(place / "model")},
            "tuner": {"type": "lora", "rank": 4},
            "data": {"source": str(place / "images"), "resolution": 64, "validation": 0.25},
            "train": {"steps": steps, "batch_size": 4, "workers": 1, "checkpoints": {"every": 1}},
            "evaluate": {"every": 1, "steps": 2, "samples": 8, "prompts": ["a photo of a dog"]},
            "storage": {name: str(place / name) for name in ("runs", "cache", "registry")},
        },
        "space": space, "metric": "val_loss", "confirm": {"top": 0},
        "pack": "off", **asked,  # or it would depend on the load who trains alone
    }  # fmt: skip


def steps_of(record: Record, state: str) -> list[int]:
    return [one.steps for one in record.trials.values() if one.state == state]


def test_a_study_ends_with_the_best_in_the_registry(ray_cluster: None, place: Path) -> None:
    space = {"train.learning_rate": {"choice": [1e-2, DIVERGING, 2e-2]}}
    evaluate = {"set": {"evaluate.beside.samples": 8}}
    study = parse_study(make_values(place, space, 2, searcher={"type": "grid"}, scheduler={"type": "fifo"},
                                    metric="diversity", confirm={"top": 2, "samples": 8}, **evaluate))  # fmt: skip
    told: list[tuple[Any, ...]] = []
    record = tune(study, "grid", progress=lambda *row: told.append(row))
    assert [(one.state, one.config["train.learning_rate"]) for one in record.trials.values()] == [
        ("finished", 1e-2), ("failed", DIVERGING), ("finished", 2e-2)
    ]  # fmt: skip
    for one in record.trials.values():
        if one.state == "failed":
            assert one.reason is not None and one.reason.startswith("train.learning_rate: ")
        else:
            assert (one.steps, [look["step"] for look in one.looks]) == (2, [1, 2])
            assert one.metrics == {"diversity": max(look["diversity"] for look in one.looks)}
    assert told[-1][0] != "trials" and [row[1:3] for row in told if row[0] == "trials"][-1] == (3, 3)
    first, second = record.finalists
    assert first["value"] >= second["value"] and first["samples"] == 8
    assert record.winner is not None and record.winner["trial"] == first["trial"]
    (published,) = record.published
    card = Registry(place / "registry").show(published)
    assert published == f"grid@{record.version}-{first['trial']}"
    assert (card.lineage.study, card.lineage.trial) == (record.folder.url(), first["trial"])
    left = json.loads(record.folder.read("study.json"))
    assert left["ended"] is not None and left["published"] == [published]
    assert not record.folder.exists("tune")
    assert load_study(record.folder.url("study.yaml")) == study
    with pytest.raises(UserError, match="^--resume: no unfinished study under"):
        tune(study, "grid", resume=True)


def test_losses_are_measured_again_at_noise_that_nobody_was_chosen_by(ray_cluster: None, place: Path) -> None:
    space = {"train.learning_rate": {"grid": [1e-7, 2e-2]}}
    held_out = {"data.validation": 0.75, "evaluate.prompts": []}
    study = parse_study(make_values(place, space, 3, searcher={"type": "grid"}, scheduler={"type": "fifo"},
                                    confirm={"top": 2}, set=held_out))  # fmt: skip
    seen: list[Standing] = []
    record = tune(study, "losses", watch=seen.append)
    assert (seen[-1].counts, seen[-1].ended, seen[-1].total, seen[-1].running) == ({"finished": 2}, 2, 2, ())
    assert {one.trial for found in seen for one in found.running} == {"00000", "00001"}
    assert seen[-1].best is not None and seen[-1].best.value == record.trials["00001"].metrics["val_loss"]
    best, other = record.finalists
    assert (best["trial"], other["trial"]) == ("00001", "00000")
    for one in record.finalists:
        assert (one["metric"], one["samples"]) == ("val_loss", 9)
        assert one["low"] < one["value"] < one["high"]
        before = record.trials[one["trial"]].metrics["val_loss"]
        assert one["value"] != before and one["value"] == pytest.approx(before, rel=0.2)
    assert best["value"] < other["value"]
    assert record.winner is not None
    said = record.winner["text"]
    assert said.startswith("00001: val_loss ") and (", better than 00000: -" in said or ", not to be told from" in said)
    assert record.table().endswith(f"winner {said}")
    assert record.published == [f"losses@{record.version}-00001"]
    page = record.folder.read("report.html").decode()
    assert "of 9 held-out images at fresh noise" in page and "val_loss, measured again" in page

    # The finalists' numbers are those of that noise; the looks' are those of the recipe's own.
    recipe, family = study.base, denoising(open_family(str(place / "model")))
    adapter = Published(f"{record.folder.url()}/finalists", f"00001@{record.version}")
    model = Model(Origin(recipe.model.source), family.fingerprint(), (adapter,))
    own, fresh = (
        validate(recipe, [model], family, "fp32", quiet, noise)[0]["val_loss"].value
        for noise in (None, recipe.data.seed + FRESH)
    )
    assert fresh == pytest.approx(best["value"], rel=1e-6)
    assert own == pytest.approx(record.trials["00001"].looks[-1]["val_loss"], rel=1e-5)


def test_poor_trials_are_stopped_and_their_places_are_free(ray_cluster: None, place: Path) -> None:
    space = {"train.learning_rate": {"grid": [2e-2, 1e-7, 1.1e-7, 1.2e-7]}}
    scheduler = {"type": "asha", "grace_period": 2, "reduction_factor": 2}
    study = parse_study(make_values(place, space, 200, searcher={"type": "random"}, scheduler=scheduler, trials=4,
                                    concurrency=2, set={"evaluate.every": 2}))  # fmt: skip
    record = tune(study, "poor")
    assert [record.trials[f"0000{number}"].state for number in range(4)].count("stopped") >= 2
    assert record.trials["00000"].state == "finished" and record.trials["00000"].steps == 200
    assert max(steps_of(record, "stopped")) < 200
    import ray

    end = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 3 and time.monotonic() < end:
        time.sleep(0.2)
    assert ray.available_resources().get("CPU") == 3
    assert record.winner is not None and record.winner["trial"] == "00000"


def test_packed_trials_learn_what_they_learn_alone(ray_cluster: None, place: Path) -> None:
    """In packs of two: who diverges does so alone, and the next gets its place; looks to 1e-5 of a solo twin's."""
    space = {"train.learning_rate": {"choice": [1e-3, DIVERGING, 2e-3]}, "tuner.rank": {"choice": [2, 4]}}
    values = make_values(place, space, 6, searcher={"type": "random", "seed": 3}, scheduler={"type": "fifo"}, trials=4,
                         set={"evaluate.every": 3, "train.batch_size": 1})  # fmt: skip
    packed = tune(parse_study({**values, "pack": 2}), "packed")
    alone = tune(parse_study({**values, "pack": "off", "trials": 1}), "alone")
    for name, one in packed.trials.items():
        diverges = one.config["train.learning_rate"] == DIVERGING
        assert one.state == ("failed" if diverges else "finished"), (name, one.reason)
        assert not diverges or (one.reason is not None and one.reason.startswith("train.learning_rate: loss is "))
    twin, first = alone.trials["00000"], packed.trials["00000"]
    assert twin.config == first.config and len(first.looks) == 2
    for mine, theirs in zip(first.looks, twin.looks, strict=True):
        assert mine["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-5)
    assert sum(one.state == "finished" for one in packed.trials.values()) >= 2
    assert packed.published


def test_a_population_takes_over_weights(ray_cluster: None, place: Path) -> None:
    space = {"train.learning_rate": {"choice": [2e-2, 1e-7]}}
    scheduler = {"type": "pbt", "interval": 60, "quantile": 0.5}
    study = parse_study(make_values(place, space, 90, scheduler=scheduler, trials=2, searcher={"seed": 1},
                                    set={"evaluate.every": 30}))  # fmt: skip
    begun = configurations(study)
    assert sorted(values["train.learning_rate"] for values in begun) == [1e-7, 2e-2]
    record = tune(study, "population")
    assert [one.state for one in record.trials.values()] == ["finished"] * 2
    poor = next(number for number, values in enumerate(begun) if values["train.learning_rate"] == 1e-7)
    looks = {int(look["step"]): look["val_loss"] for look in record.trials[f"{poor:05d}"].looks}
    theirs = {int(look["step"]): look["val_loss"] for look in record.trials[f"{1 - poor:05d}"].looks}
    # At its own rate nothing changes that can be seen; from the exchange on it knows what the other knew there.
    assert list(looks) == list(theirs) == [30, 60, 90]
    assert looks[60] == pytest.approx(looks[30], rel=1e-3)
    assert theirs[60] < 0.95 * looks[60] and looks[90] < 0.95 * looks[60]


def test_a_rate_is_carried_from_the_smallest_rank_and_what_was_cut_off_goes_on(ray_cluster: None, place: Path) -> None:
    space = {"tuner.rank": {"choice": [4, 2]}, "train.learning_rate": {"grid": [1e-7, 2e-2]}}
    study = parse_study(make_values(place, space, 4, searcher={"type": "grid"}, scheduler={"type": "fifo"},
                                    transfer_rank=True, set={"tuner.alpha": 8}))  # fmt: skip
    expected = [(2, 1e-7, None), (2, 2e-2, None), (4, 2e-2, "00001")]

    def tried(record: Record) -> list[tuple[int, float, str | None]]:
        trials = record.trials.values()
        assert {one.state for one in trials} == {"finished"}
        return [(one.config["tuner.rank"], one.config["train.learning_rate"], one.carried) for one in trials]

    record = tune(study, "ranks")
    assert tried(record) == expected
    left = json.loads(record.folder.read("study.json"))
    left["ended"], left["trials"][2]["state"] = None, "running"
    record.folder.write("study.json", json.dumps(left).encode())
    results = sorted((place / "runs" / "ranks").glob("*/trials/*/*/result.json"))
    results[2].unlink()
    before = [path.stat().st_mtime_ns for path in results[:2]]
    assert tried(tune(study, "ranks", resume=True)) == expected
    assert [path.stat().st_mtime_ns for path in results[:2]] == before and results[2].exists()


@pytest.mark.soak
def test_quality_is_weighed_against_what_a_picture_takes(ray_cluster: None, place: Path) -> None:
    """What is taught for few steps is drawn in fewer, in the search and when it is measured again, and costs less."""
    space = {"objective.type": {"grid": ["denoise", "consistency"]},
             "evaluate.steps": {"choice": [2], "when": {"objective.type": "consistency"}}}  # fmt: skip
    both = ["diversity", "inference_tflops"]
    study = parse_study(make_values(place, space, 2, searcher={"type": "grid"}, metric=both, publish={"top": 2},
                                    confirm={"top": 2, "samples": 8},
                                    set={"evaluate.beside.samples": 8, "evaluate.steps": 6}))  # fmt: skip
    record = tune(study, "costs")
    many, few = record.trials["00000"], record.trials["00001"]
    assert (many.state, few.state, few.config["evaluate.steps"]) == ("finished", "finished", 2)
    folders = {}
    for name, one in record.trials.items():
        recipe = study.recipe_of(one.config)
        version = next(item for item in record.published if item.endswith(name))
        folder = Registry(place / "registry").fetch(version)
        assert one.metrics["inference_tflops"] == inference_tflops(recipe, folder) > inference_tflops(recipe)
        folders[name] = folder
    # The adapters are alike; PNDM makes seven passes of six steps, each of two rows, the other two of one. Both decode.
    recipe = study.recipe_of(few.config)
    longer = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"steps": 3})})
    one_pass = inference_tflops(longer, folders["00001"]) - few.metrics["inference_tflops"]
    more = many.metrics["inference_tflops"] - few.metrics["inference_tflops"]
    assert one_pass > 0 and more == pytest.approx((7 * 2 - 2) * one_pass, rel=1e-9)
    assert {one["trial"] for one in record.finalists} == {"00000", "00001"}
    assert "inference_tflops" in record.table().splitlines()[0]
    page = record.folder.read("report.html").decode()
    assert "diversity and inference_tflops" in page and "What goes with inference_tflops" in page
    steps = [
        json.loads(file.read_text())["sampling"]["steps"]
        for name in ("00000", "00001")
        for file in Path(record.folder.url()).glob(f"finalists/{name}/*/evaluations/*.json")
    ]
    assert steps == [6, 2]


@pytest.mark.soak
def test_hyperband_pauses_trials_at_a_rung_and_goes_on_with_the_good_ones(ray_cluster: None, place: Path) -> None:
    space = {"train.learning_rate": {"grid": [1e-7, 1.1e-7, 1.2e-7, 2e-2, 1.3e-7, 1.4e-7]}}
    scheduler = {"type": "hyperband", "reduction_factor": 2}
    study = parse_study(make_values(place, space, 40, scheduler=scheduler, trials=6, set={"evaluate.every": 10}))
    record = tune(study, "bands")
    found = [(one.state, one.steps) for _, one in sorted(record.trials.items())]
    # Four looks make a first bracket of three whole runs, and one whose three trials wait for each other at the second.
    assert found[:4] == [("finished", 40)] * 4
    # The poor one of the three is dropped at the second look; it makes no other, and leaves within a few steps.
    assert sorted(state for state, _ in found[4:]) == ["finished", "stopped"]
    stopped = next(one for one in record.trials.values() if one.state == "stopped")
    assert [look["step"] for look in stopped.looks] == [10, 20]
    assert record.winner is not None and record.winner["trial"] == "00003"
    for one in record.trials.values():
        assert [look["step"] for look in one.looks] == list(range(10, one.steps + 1, 10))


@pytest.mark.soak
@pytest.mark.parametrize(
    ("searcher", "scheduler", "packages"),
    [
        ({"type": "optuna", "startup": 2}, "fifo", ["optuna"]),
        ({"type": "hyperopt", "startup": 2}, "fifo", ["hyperopt"]),
        ({"type": "bohb"}, "bohb", ["hpbandster", "ConfigSpace"]),
    ],
)
def test_a_searcher_chooses_from_what_it_was_told(
    ray_cluster: None, place: Path, searcher: dict[str, Any], scheduler: str, packages: list[str]
) -> None:
    for package in packages:
        pytest.importorskip(package)
    space = {"train.learning_rate": {"loguniform": [1e-7, 2e-2]}, "tuner.rank": {"choice": [2, 4]}}
    study = parse_study(make_values(place, space, 4, searcher=searcher, trials=4, scheduler={"type": scheduler},
                                    concurrency=2))  # fmt: skip
    record = tune(study, searcher["type"])
    found = [(name, one.state) for name, one in sorted(record.trials.items())]
    if scheduler == "fifo":
        assert found == [(f"0000{number}", "finished") for number in range(4)]
    else:  # which of them are dropped depends on what it drew
        assert [name for name, _ in found] == [f"0000{number}" for number in range(4)]
        assert {state for _, state in found} <= {"finished", "stopped"}
    assert len({one.config["train.learning_rate"] for one in record.trials.values()}) == 4
    assert {type(one.config["tuner.rank"]) for one in record.trials.values()} == {int}


COMMAND = [sys.executable, "-c", "from gtl.cli import main; main()", "tune"]


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.soak)])
def test_a_study_that_ended_early_goes_on_and_repeats_nothing(place: Path, tmp_path: Path, how: signal.Signals) -> None:
    space = {"train.learning_rate": {"choice": [1e-3, 1e-2, 2e-2]}}
    values = make_values(place, space, 6, searcher={"type": "grid"}, scheduler={"type": "fifo"}, pack="auto")
    file = tmp_path / f"{how.name.lower()}.yaml"
    file.write_text(json.dumps(values))
    options: dict[str, Any] = {"env": {**os.environ, "RAY_ADDRESS": "local"}, "text": True}
    running = subprocess.Popen([*COMMAND, str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)
    folder = place / "runs" / file.stem
    end = time.monotonic() + 400
    while len(list(folder.glob("*/trials/*/*/result.json"))) < 1 and time.monotonic() < end:
        assert running.poll() is None, running.stderr.read() if running.stderr else ""
        time.sleep(0.1)
    running.send_signal(how)
    _, said = running.communicate()
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*/trials/*/*/result.json")}
    assert 1 <= len(done) < 3
    if how == signal.SIGINT:
        assert running.returncode == 130 and said.splitlines()[-1].endswith("--resume goes on"), said
        left = json.loads(next(folder.glob("*/study.json")).read_text())
        states = [trial["state"] for trial in left["trials"]]
        assert left["ended"] is None and set(states) <= {"finished", "running", "waiting"}
    status, screen = in_terminal([*COMMAND, str(file), "--resume"], options["env"])
    assert status == 0, screen
    table = r"trials (\d)/3: .*\n(?:best +0000\d: .*\n)?trial +learning_rate +step +val_loss *\n0000\d "
    assert str(len(done)) in re.findall(table, plain(screen)), screen
    lines = plain(screen).splitlines()
    rows = [line.split() for line in lines if re.search(r"^0000\d .* finished *$", line)]
    assert sorted(row[0] for row in rows) == ["00000", "00001", "00002"]
    assert lines[-1].startswith(f"adapter {file.stem}@")
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"set": {"train.workers": 9}}, "train.workers: 9 workers with 1 CPUs each need 9 CPUs; the cluster has 3"),
        ({"space": {"train.learning_rate": {"choice": [DIVERGING]}}}, "no trial ran to its end: train.learning_rate: "),
    ],
)
def test_what_cannot_be_is_one_line(ray_cluster: None, place: Path, asked: dict[str, Any], message: str) -> None:
    values = make_values(place, {"train.learning_rate": {"choice": [1e-3]}}, 2, scheduler={"type": "fifo"}) | asked
    study: Study = parse_study(values)
    with pytest.raises(UserError) as caught:
        tune(study, "never")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
