"""`gtl bench train`: the command as a user runs it, its arithmetic, and its refusals."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from gtl.bench.train import Round, bench_train, summary
from gtl.types import UserError

KEYS = {
    "model", "resolution", "batch_size", "steps", "rounds", "gtl_images_per_second", "bare_images_per_second", "ratios",
    "median_ratio", "data_wait", "gtl_loss", "bare_loss", "peak_memory_bytes", "dtype", "device", "threads", "cores",
    "load_average", "torch", "gtl",
}  # fmt: skip


def test_the_command_prints_a_table_and_writes_what_it_measured(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    # A process of its own: DeepSpeed keeps the first process group it meets for as long as the process lives.
    command = [Path(sys.executable).with_name("gtl"), "bench", "train", "--batch-size=2", "--steps=2", "--rounds=1"]
    done = subprocess.run([*command, "--json", file], check=True, capture_output=True, text=True)
    result = json.loads(file.read_text())
    assert result.keys() == KEYS
    assert (result["model"], result["resolution"], result["batch_size"]) == ("small", [128, 128], 2)
    assert math.isfinite(result["gtl_loss"]) and math.isfinite(result["bare_loss"])
    assert result["gtl_images_per_second"] > 0 and result["bare_images_per_second"] > 0
    assert result["ratios"] == [result["median_ratio"]]
    assert 0 <= result["data_wait"] < 1
    rows = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert rows == ["model", "hardware", "gtl", "bare", "gtl / bare", "memory", "software"]
    assert done.stderr.splitlines()[0] == "model small"
    assert done.stderr.splitlines()[-1] == f"rounds 1/1 gtl / bare {result['median_ratio']:.3f}"


def test_the_ratio_is_of_times_within_a_round() -> None:
    rounds = [Round(2.0, 0.5, 1.0, 0.4, 0.1), Round(3.0, 0.5, 4.0, 0.4, 0.3), Round(1.1, 0.6, 1.0, 0.7, 0.2)]
    assert summary(rounds, 12) == {
        "gtl_images_per_second": 6.0, "bare_images_per_second": 12.0, "ratios": [2.0, 0.75, 1.1], "median_ratio": 1.1,
        "data_wait": 0.2, "gtl_loss": 0.6, "bare_loss": 0.7,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "sdxl"}, "--model: 'sdxl': choose from small, sd15"),
        ({"steps": 0}, "--steps: 0: must be 1 or more"),
        ({"rounds": 0}, "--rounds: 0: must be 1 or more"),
        ({"batch_size": -1}, "--batch-size: -1: must be 1 or more"),
        ({"file": Path("nowhere/x.json")}, "--json: nowhere/x.json: its folder does not exist"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"model": "small", "batch_size": 2, "steps": 1, "rounds": 1, "file": None}
    with pytest.raises(UserError) as error:
        bench_train(**arguments | change, progress=lambda *shown: None)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_workers_learn_the_same_from_the_same_batches(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    command = [Path(sys.executable).with_name("gtl"), "bench", "train", "--batch-size=2", "--steps=2", "--rounds=1"]
    wanted = ["--workers=1", "--workers=2", "--stage=2", "--json", file]
    done = subprocess.run([*command, *wanted], check=True, capture_output=True, text=True)
    result = json.loads(file.read_text())
    assert (result["batch_size"], result["stage"]) == (2, 2)
    one, two = result["rows"]
    assert (one["workers"], two["workers"]) == (1, 2)
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert min(one["images_per_second"], two["images_per_second"]) > 0
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers=0"], "--workers: [0]: each must be 1 or more"),
        (["--workers=1", "--stage=4"], "--stage: 4: must be from 0 to 3"),
    ],
)
def test_a_wrong_number_of_workers_is_one_line(arguments: list[str], message: str) -> None:
    command = [Path(sys.executable).with_name("gtl"), "bench", "train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"error: {message}")
